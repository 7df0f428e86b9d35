"""What a class asks for is what transformers builds, saves and reports: names, shapes and ties, for every family."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from converter.families import expected_child
from converter.families.expected import Expected, Unknown, compare, expected
from healthy.models import USUAL, Saved
from healthy.shrink import NotTinyError, build, everything
from oracle.bases import quiet, read_tensors, write_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

Shapes = dict[str, tuple[int, ...]]


def shapes_in(folder: Path) -> Shapes:
    return {n: tuple(t.shape) for n, t in read_tensors(folder).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def known(config: dict[str, Any]) -> Expected:
    found = expected(config)
    assert isinstance(found, Expected), found
    return found


def report(folder: Path) -> dict[str, Any]:
    """What transformers says of a folder when it loads it."""
    named = getattr(transformers, config_of(folder)["architectures"][0])
    with quiet():
        _, info = named.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    return {k: v for k, v in info.items() if v and k != "error_msgs"}


def expect_as_saved(saved: Saved, folder: Path) -> None:
    saved.write(folder)
    config, stored = config_of(folder), shapes_in(folder)
    wanted = known(config)
    assert dict(wanted.saved) == stored
    assert not compare(stored, wanted, config)
    model = build(saved.task, saved.kind, **dict(saved.more))
    state = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    # A formula has names on disk; where a load makes others of them they are names in memory too.
    if not wanted.source.startswith("formulas") or state.keys() <= wanted.memory.keys():
        assert dict(wanted.memory) == state
    tied = dict(model.all_tied_weights_keys)
    assert {n for group in wanted.ties for n in group} >= {*tied, *tied.values()}
    assert all(any(n in g and source in g for g in wanted.ties) for n, source in tied.items())


@pytest.mark.parametrize("saved", USUAL)
def test_names_shapes_and_ties_are_those_of_transformers(saved: Saved, tmp_path: Path) -> None:
    expect_as_saved(saved, tmp_path / "model")
    assert report(tmp_path / "model") == {}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), everything())
def test_names_shapes_and_ties_of_every_architecture_are_those_of_transformers(
    task: str, kind: str, tmp_path: Path
) -> None:
    try:
        build(task, kind)
    except NotTinyError as error:
        pytest.skip(str(error))
    expect_as_saved(Saved(task, kind), tmp_path / "model")


FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen3_moe", "opt", "deepseek_v4")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_missing_a_renamed_and_a_halved_tensor_are_named(kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind, more=(("tie_word_embeddings", False),)).write(tmp_path / "model")
    config, stored = config_of(folder), shapes_in(folder)
    wanted = known(config)
    for name, shape in stored.items():
        others = {n: s for n, s in stored.items() if n != name}
        assert set(compare(others, wanted, config).missing) == {name}
        other = f"{name.rpartition('.')[0]}.lost"
        found = compare({**others, other: shape}, wanted, config)
        assert set(found.missing) == {name} and set(found.unexpected) == {other}
        halved = (shape[0] // 2, *shape[1:])
        assert compare({**others, name: halved}, wanted, config).misshapen == {name: (halved, shape)}


@pytest.mark.parametrize(
    ("task", "kind"), [("causal", "mixtral"), ("causal", "qwen3_moe"), ("multimodal", "llava"), ("seqcls", "llama")]
)
def test_names_in_memory_are_accepted_as_a_load_accepts_them(task: str, kind: str, tmp_path: Path) -> None:
    model = build(task, kind)
    with quiet():
        model.save_pretrained(tmp_path, save_original_format=False)
    assert report(tmp_path) == {}
    config, stored = config_of(tmp_path), shapes_in(tmp_path)
    wanted = known(config)
    assert not compare(stored, wanted, config)
    for name in stored:
        assert compare({n: s for n, s in stored.items() if n != name}, wanted, config).missing, name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_a_backbone_without_its_prefix_lacks_its_head_alone(kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind, more=(("tie_word_embeddings", False),)).write(tmp_path / "model")
    config, tensors = config_of(folder), read_tensors(folder)
    prefix = f"{type(build('causal', kind)).base_model_prefix}."
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    write_tensors(folder, inside)
    found = compare(shapes_in(folder), known(config), config)
    assert set(found.missing) == {n for n in tensors if not n.startswith(prefix)}
    assert not found.unexpected and not found.misshapen
    assert len(report(folder)["missing_keys"]) == len(found.missing)  # by its name in memory


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_of_a_tie_is_enough_and_none_is_missing(stored: str, tmp_path: Path) -> None:
    folder = Saved("causal", "qwen2", more=(("tie_word_embeddings", True),)).write(tmp_path / "model")
    config, tensors = config_of(folder), read_tensors(folder)
    embedding = tensors.pop("model.embed_tokens.weight")
    write_tensors(folder, {**tensors, stored: embedding})
    assert report(folder) == {}
    assert not compare(shapes_in(folder), known(config), config)
    write_tensors(folder, tensors)
    assert set(compare(shapes_in(folder), known(config), config).missing) == {"model.embed_tokens.weight"}
    assert report(folder)["missing_keys"]


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["TheirsForCausalLM"], "model_type": "theirs"},
        {"architectures": ["TheirsForCausalLM"], "model_type": "llama", "auto_map": {"AutoModel": "theirs.Theirs"}},
        {},
        {"architectures": ["AutoTokenizer"]},
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": "wide"},
    ],
)
def test_a_family_that_nobody_knows_is_unknown(config: dict[str, Any]) -> None:
    found = expected(config)
    assert isinstance(found, Unknown)
    assert found.words.startswith("names and shapes not checked: family unknown")


def test_a_class_that_a_trainer_invented_is_judged_by_its_backbone(tmp_path: Path) -> None:
    folder = Saved("causal", "qwen2", more=(("tie_word_embeddings", False),)).write(tmp_path / "model")
    config = {**config_of(folder), "architectures": ["Qwen2ForReward"]}
    stored = shapes_in(folder)
    del stored["lm_head.weight"]
    assert not compare(stored, known(config), config)
    del stored["model.norm.weight"]
    assert set(compare(stored, known(config), config).missing) == {"model.norm.weight"}


def test_what_transformers_said_is_kept_for_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch.device("meta"), quiet():
        model = transformers.OPTForCausalLM(transformers.OPTConfig(hidden_size=24, num_hidden_layers=1, ffn_dim=7))
    config = {**model.config.to_dict(), "architectures": ["OPTForCausalLM"]}
    expected_child._known.clear()
    first = expected_child.described("OPTForCausalLM", config)
    (kept,) = (tmp_path / "rlhf-convert" / "expected").iterdir()
    assert json.loads(kept.read_text()) == first
    kept.write_text("{}")  # not an answer: asked again
    expected_child._known.clear()
    assert expected_child.described("OPTForCausalLM", config) == first
    assert {n: tuple(s) for n, s in first["memory"].items()} == {
        n: tuple(t.shape) for n, t in model.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "qwen2_moe"])
def test_the_number_of_experts_is_read_under_either_of_its_names(kind: str, tmp_path: Path) -> None:
    # transformers 4 wrote num_experts for Qwen3-MoE, as the models on the Hub have it; version 5 num_local_experts.
    folder = Saved("causal", kind).write(tmp_path / "model")
    config, stored = config_of(folder), shapes_in(folder)
    own = next(k for k in ("num_local_experts", "num_experts") if k in config)
    other = {"num_local_experts": "num_experts", "num_experts": "num_local_experts"}[own]
    if other not in (type(build("causal", kind).config).attribute_map or {}):
        pytest.skip("transformers knows one name")
    renamed = {k: v for k, v in config.items() if k != own} | {other: config[own]}
    assert not compare(stored, known(renamed), renamed)
