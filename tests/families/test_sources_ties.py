"""Ties inferred from names and config, against what transformers itself ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import oracle
from all_families import FAMILIES, input_of, output_of, small
from converter.families.memory_names import architecture
from converter.families.ties import _table, find_ties, is_tied, ties, was_tied
from converter.sources.hf import source as hf
from oracle.bases import FAMILIES as BASES
from oracle.bases import quiet

LLAMA = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
CAUSAL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
TIED = CAUSAL | {"tie_word_embeddings": True}
PAIR = (("model.embed_tokens.weight", "lm_head.weight"),)


# Against transformers


def transformers_ties(folder: Path) -> set[frozenset[str]]:
    """Names that share memory in the model that transformers loads, in the words of the files."""
    import transformers

    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(g) for g in groups.values() if len(g) > 1}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", BASES)
def test_ties_of_a_family_are_those_that_transformers_makes(family: str, tied: bool, tmp_path: Path) -> None:
    oracle.make_base(tmp_path / "base", family, tied=tied)
    found = hf.SOURCE.open(tmp_path / "base", asked="base").ties
    # GPT-NeoX's head is `embed_out` on disk and `lm_head` in memory.
    in_memory = {frozenset(n.replace("embed_out", "lm_head") for n in group) for group in found}
    assert in_memory == transformers_ties(tmp_path / "base")
    assert len(found) == int(tied)
    for group in found:
        assert BASES[family].embedding in group[0]


@pytest.mark.parametrize(("task", "kind"), FAMILIES, ids=[kind for _, kind in FAMILIES])
def test_a_silent_config_means_what_its_class_means(task: str, kind: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert is_tied({"model_type": kind}) is bool(CONFIG_MAPPING[kind]().tie_word_embeddings)


@pytest.mark.parametrize("own", [True, False, None])
@pytest.mark.parametrize(("task", "kind"), FAMILIES, ids=[kind for _, kind in FAMILIES])
def test_is_tied_is_what_the_config_class_makes_of_config_json(task: str, kind: str, own: bool | None) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {"model_type": kind, **({} if own is None else {"tie_word_embeddings": own})}
    assert is_tied(config) is bool(CONFIG_MAPPING[kind].from_dict(config).tie_word_embeddings)


@pytest.mark.parametrize(("task", "kind"), FAMILIES, ids=[kind for _, kind in FAMILIES])
def test_groups_are_those_of_the_model_and_its_tied_weights_keys(task: str, kind: str, tmp_path: Path) -> None:
    model = small(task, kind, tied=True)
    expected: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        expected.setdefault(source, {source}).add(target)
    with quiet():
        model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    built = architecture(type(model).__name__, config)
    assert built is not None
    found = find_ties(oracle.read_tensors(tmp_path / "m"), config)
    assert {frozenset(built.in_memory(n)[0] for n in group) for group in found} == {*map(frozenset, expected.values())}
    assert input_of(kind) == found[0][0]
    assert output_of(kind) in found[0]


@pytest.mark.slow
def test_the_table_of_configs_is_that_of_the_installed_transformers() -> None:
    from make_ties import of_configs

    with quiet():
        made = of_configs()
    assert {key: made[key] for key in made} == {key: sorted(_table()[key]) for key in made}


@pytest.mark.slow
def test_the_table_of_classes_is_that_of_the_installed_transformers() -> None:
    from make_memory_names import model_classes
    from make_ties import of_class

    classes, wrong = model_classes(), []
    for name, rows in _table()["of_class"].items():
        with quiet():
            made = of_class(classes[name])
        if made is not None and [[p, list(m)] for p, _, m in made] != [[r[0], r[-1]] for r in rows]:
            wrong.append(name)
    assert wrong == []


# The config's word


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        pytest.param(TIED, LLAMA, PAIR, id="embedding-stored"),
        pytest.param(TIED, [*LLAMA, "lm_head.weight"], PAIR, id="both-stored"),
        pytest.param(TIED, ["lm_head.weight", *LLAMA[1:]], PAIR, id="head-stored"),
        pytest.param(TIED | {"tie_word_embeddings": False}, [*LLAMA, "lm_head.weight"], (), id="untied"),
        pytest.param(TIED | {"tie_word_embeddings": False}, LLAMA, (), id="untied-and-head-lost"),
        pytest.param(CAUSAL, [*LLAMA, "lm_head.weight"], (), id="silent-llama"),
        pytest.param(CAUSAL | {"model_type": "gemma"}, [*LLAMA, "lm_head.weight"], PAIR, id="silent-gemma"),
        pytest.param({"model_type": "our_own"}, LLAMA, PAIR, id="silent-and-unknown-without-a-head"),
        pytest.param({"model_type": "our_own"}, [*LLAMA, "lm_head.weight"], (), id="silent-and-unknown-with-a-head"),
        pytest.param(
            TIED | {"architectures": ["LlamaForSequenceClassification"]}, LLAMA, (), id="no-head-in-the-class"
        ),
        pytest.param(TIED | {"architectures": ["LlamaModel"]}, LLAMA, (), id="backbone-class"),
        pytest.param(TIED | {"architectures": None}, LLAMA, PAIR, id="no-class-named"),
        pytest.param(TIED | {"architectures": [3]}, LLAMA, (), id="class-that-is-no-name"),
        pytest.param(
            CAUSAL | {"tie_word_embeddings": "yes"}, [*LLAMA, "lm_head.weight"], (), id="word-that-is-no-bool"
        ),
        pytest.param(TIED, ["model.norm.weight"], (), id="neither-stored"),
        pytest.param(TIED, [], (), id="nothing-stored"),
    ],
)
def test_config_decides(config: dict[str, Any], names: list[str], expected: tuple[tuple[str, ...], ...]) -> None:
    assert find_ties(names, config) == expected


NAMES = {
    "bare gpt2": ("gpt2", ["wte.weight", "h.0.ln_1.weight"], ("wte.weight", "lm_head.weight")),
    "gpt2 by its head": (
        "gpt2",
        ["lm_head.weight", "transformer.h.0.ln_1.weight"],
        ("transformer.wte.weight", "lm_head.weight"),
    ),
    "opt": ("opt", ["model.decoder.embed_tokens.weight"], ("model.decoder.embed_tokens.weight", "lm_head.weight")),
    "bare opt": ("opt", ["decoder.embed_tokens.weight"], ("decoder.embed_tokens.weight", "lm_head.weight")),
    "gpt-neox": ("gpt_neox", ["gpt_neox.embed_in.weight"], ("gpt_neox.embed_in.weight", "embed_out.weight")),
    "falcon": (
        "falcon",
        ["transformer.word_embeddings.weight"],
        ("transformer.word_embeddings.weight", "lm_head.weight"),
    ),
    "mamba": ("mamba", ["backbone.embeddings.weight"], ("backbone.embeddings.weight", "lm_head.weight")),
    "whisper": (
        "whisper",
        ["model.decoder.embed_tokens.weight"],
        ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    ),
    "new vision language": (
        "gemma3",
        ["model.language_model.embed_tokens.weight", "model.vision_tower.x.weight"],
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ),
    "old vision language": (
        "gemma3",
        ["language_model.model.embed_tokens.weight", "vision_tower.x.weight"],
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ),
    "bart": (
        "bart",
        ["model.shared.weight"],
        (
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_on_disk_are_paired(name: str) -> None:
    kind, names, expected = NAMES[name]
    assert find_ties(names, {"model_type": kind, "tie_word_embeddings": True}) == (expected,)


def test_head_of_an_encoder_is_told_by_what_is_beside_it() -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    names = ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.transform.dense.weight"]
    assert find_ties(names, config) == (
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    )


T5 = ["shared.weight", "encoder.block.0.x.weight", "decoder.block.0.x.weight"]
COPIES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        pytest.param({}, T5, (*COPIES, "lm_head.weight"), id="T5"),
        pytest.param({"tie_word_embeddings": False}, [*T5, "lm_head.weight"], COPIES, id="T5-1.1"),
        pytest.param({"architectures": ["T5EncoderModel"]}, T5[:2], COPIES[:2], id="encoder-alone"),
    ],
)
def test_t5_shares_its_embedding_whatever_the_config_says(
    config: dict[str, Any], names: list[str], expected: tuple[str, ...]
) -> None:
    assert find_ties(names, config | {"model_type": "t5"}) == (expected,)


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5", "longt5"])
def test_these_are_tied_whatever_their_config_says(kind: str) -> None:
    """Expected: what the config of transformers makes of the same word."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert CONFIG_MAPPING[kind].from_dict({"tie_word_embeddings": False}).tie_word_embeddings is True
    assert is_tied({"model_type": kind, "tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("kind", "outer", "inner", "tied"),
    [
        ("qwen2_vl", {}, True, True),
        ("qwen2_vl", {"tie_word_embeddings": False}, True, True),
        ("qwen2_vl", {}, False, False),
        ("llava", {}, True, True),
        ("qwen3_vl", {"tie_word_embeddings": False}, True, False),
        ("qwen3_vl", {"tie_word_embeddings": True}, False, True),
    ],
)
def test_word_of_a_nested_config_counts_where_transformers_lets_it(
    kind: str, outer: dict[str, Any], inner: bool, tied: bool
) -> None:
    """Expected: `AutoConfig` of transformers 5.23 on the same JSON (checked below)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text = CONFIG_MAPPING[kind]().text_config.model_type
    config = {"model_type": kind, "text_config": {"model_type": text, "tie_word_embeddings": inner}, **outer}
    assert CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(config))).tie_word_embeddings is tied
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert bool(find_ties(names, config)) is tied


@pytest.mark.parametrize(
    ("config", "ties"),
    [
        ({"model_type": "mistral3"}, False),
        ({"model_type": "mt5"}, False),
        ({"model_type": "blip-2"}, True),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "qwen3_vl", "text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, True),
    ],
)
def test_transformers_4_asks_the_text_model(config: dict[str, Any], ties: bool) -> None:
    """Expected: `config.get_text_config(decoder=True).tie_word_embeddings` of transformers 4.57.6."""
    assert was_tied(config) is ties


def test_a_class_that_transformers_4_lacks_is_tied_by_no_release_where_its_config_says_no() -> None:
    names = ["model.text_model.embeddings.tok_embeddings.weight", "lm_head.weight"]
    config = {
        "model_type": "modernvbert",
        "architectures": ["ModernVBertForMaskedLM"],
        "tie_word_embeddings": False,
        "text_config": {"model_type": "modernbert", "tie_word_embeddings": True},
    }
    assert ties(names, config) == ()
    older = ["model.embed_tokens.weight", "lm_head.weight"]
    thinker = config | {"architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"]}
    thinker |= {"model_type": "qwen2_5_omni_thinker", "text_config": {"tie_word_embeddings": True}}
    (tie,) = ties(older, thinker)
    assert (tie.newer, tie.older) == (False, True)  # loaded with both releases: 4.57.6 makes them one, 5.23 does not


def test_experts_of_a_model_inside_another_are_stacked_in_memory() -> None:
    """Source: `state_dict()` of Qwen4ExpForConditionalGeneration of transformers 5.23 on the meta device."""
    config = {"model_type": "qwen4_exp", "text_config": {"model_type": "qwen4_exp_text"}}
    built = architecture("Qwen4ExpForConditionalGeneration", config)
    assert built is not None
    memory, change = built.in_memory("model.language_model.layers.1.mlp.experts.0.down_proj.weight")
    assert memory == "model.language_model.layers.1.mlp.experts.down_proj" and change is not None
