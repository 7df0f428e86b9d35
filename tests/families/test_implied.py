"""The tensors that a config implies are those that transformers saves; one that is lost or of another size is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from converter.families import implied
from oracle.bases import quiet, read_tensors
from oracle.families import CASES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd"), 24),
    **dict.fromkeys(("num_attention_heads", "n_head"), 6),
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 38,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 18,
    "vocab_size": 67,
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 5),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 31),
    **dict.fromkeys(("num_experts", "num_local_experts"), 6),
    "num_experts_per_tok": 2,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SOME = (
    "LlamaForCausalLM MistralForSequenceClassification Qwen2ForCausalLM Qwen3ForTokenClassification Gemma2ForCausalLM "
    "GPT2LMHeadModel GPTNeoXForCausalLM FalconForCausalLM BloomForCausalLM MixtralForCausalLM Qwen2MoeForCausalLM "
    "Qwen3MoeForSequenceClassification Phi3ForCausalLM OlmoeForCausalLM"
)


def _saved(cls: Any, folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    known = cls.config_class().to_dict()
    renamed = cls.config_class.attribute_map or {}
    given = {k: v for k, v in SIZES.items() if k in known or k == "num_labels" or k in renamed.values()}
    with quiet():
        config = cls.config_class(**{**given, **settings})
        cls._from_config(config, dtype=torch.float32).save_pretrained(folder)
    shapes = {n: tuple(t.shape) for n, t in read_tensors(folder).items()}
    return {**config.to_dict(), "architectures": [cls.__name__]}, shapes


@pytest.mark.parametrize("name", SOME.split())
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_that_transformers_saves(tmp_path: Path, name: str, tied: bool) -> None:
    config, saved = _saved(getattr(transformers, name), tmp_path / "m", tie_word_embeddings=tied)
    found = implied.implied(config)
    assert found is not None and dict(found.shapes) == saved
    assert implied.lacks(saved, config) == []
    some = sorted(saved)[len(saved) // 2]
    assert some in " ".join(implied.lacks({n: s for n, s in saved.items() if n != some}, config))
    assert implied.lacks({**saved, some: (*saved[some][:-1], 1)}, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", implied.classes())
def test_every_class_of_the_table_is_as_transformers_saves_it(tmp_path: Path, name: str) -> None:
    more = {"head_dim": 4} if name.startswith(("GptOss",)) else {}
    config, saved = _saved(getattr(transformers, name), tmp_path / "m", tie_word_embeddings=False, **more)
    found = implied.implied(config)
    assert found is not None and dict(found.shapes) == saved


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}),
        ("LlamaForCausalLM", {"mlp_bias": True}),
        ("GPT2LMHeadModel", {"n_inner": 70}),
        ("FalconForCausalLM", {"new_decoder_architecture": True}),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": [1]}),
    ],
)
def test_settings_under_which_a_class_has_other_tensors_are_not_of_the_table(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    config, saved = _saved(getattr(transformers, name), tmp_path / "m", **settings)
    assert implied.implied(config) is None
    told = implied.lacks(saved, config)
    assert told == [] or "can't be told" in told[0]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_what_no_table_has_is_told_by_its_layers_its_embeddings_and_its_norm(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    with quiet():
        model = getattr(transformers, case.auto).from_config(case.config(), dtype=torch.float32)
        model.save_pretrained(tmp_path / "m")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    saved = {n: tuple(t.shape) for n, t in read_tensors(tmp_path / "m").items()}
    assert implied.lacks(saved, config) == []
    layer = next(n for n in saved if ".1." in n and not any(w in n for w in ("vision", "visual", "experts")))
    assert implied.lacks({n: s for n, s in saved.items() if n != layer}, config)
    whole = [n for n in saved if not n.startswith(layer.partition(".1.")[0] + ".1.")]
    assert implied.lacks({n: saved[n] for n in whole}, config)


@pytest.mark.parametrize(
    "hostile", [{"num_hidden_layers": 10**18}, {"num_hidden_layers": -3}, {"num_hidden_layers": True}]
)
def test_a_config_that_claims_any_number_of_layers_is_no_burden(hostile: dict[str, Any]) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **SIZES, **hostile}
    assert implied.lacks({"model.layers.0.mlp.up_proj.weight": (38, 24)}, config)


@pytest.mark.parametrize("name", ["t5", "bart", "deepseek_v3"])
def test_layers_that_differ_by_their_place_are_not_judged_without_a_table(tmp_path: Path, name: str) -> None:
    with quiet():
        model = getattr(transformers, CASES[name].auto).from_config(CASES[name].config(), dtype=torch.float32)
        model.save_pretrained(tmp_path / "m")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    told = " ".join(implied.lacks({n: tuple(t.shape) for n, t in read_tensors(tmp_path / "m").items()}, config))
    assert "do not tell" in told or "can't be told" in told
