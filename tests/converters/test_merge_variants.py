"""Every variant of LoRA that `merge-lora` takes, against PEFT's own merge and its unmerged forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle.adapters import adapter_tensors
from oracle.bases import edit_config, make_vision_base
from oracle.command import merged, run
from oracle.expected import inputs_for, one_thread
from selected import one_in

TOLERANCE = {"float32": 3e-6, "float16": 3e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Variant:
    """An adapter over a family of models; `keys` must occur among the adapter's tensor names."""

    family: str
    settings: dict[str, Any]
    keys: str = "lora_A.weight"
    dtype: str = "bfloat16"
    tied: bool = False
    exact_in_best: bool = True  # whether the fp64 reference knows this variant
    noise: float | None = None


VARIANTS = {
    # Sorted as JSON sorts them on saving; two patterns match some modules, the first one counts; "proj" matches none.
    "patterns-anchored": Variant(
        "llama",
        {
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "layers.1.mlp.up_proj": 7, "proj": 9, "q_proj": 2},
            "alpha_pattern": {r"layers\.[01]\.self_attn.v_proj": 3, "proj": 99, "v_proj": 11, "^q_proj": 77},
        },
    ),
    "patterns-regex": Variant(
        "gpt2", {"rank_pattern": {r".*h\.0\..*c_(attn|proj)": 4, "c_proj": 2}, "alpha_pattern": {".*mlp.*": 7}}
    ),
    "patterns-rslora": Variant(
        "qwen2", {"use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"k_proj": 2}}
    ),
    "lora-bias": Variant("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, "lora_B.bias"),
    "lora-bias-float32": Variant("gpt2", {"lora_bias": True}, "lora_B.bias", dtype="float32"),
    "bias-all": Variant("opt", {"bias": "all"}, "final_layer_norm.bias"),
    "bias-all-base-layer": Variant("qwen2", {"bias": "all"}, "q_proj.base_layer.bias"),
    "bias-lora-only": Variant("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"]}, "c_attn.base_layer.bias"),
    "head-saved": Variant("llama", {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "head-and-embedding-saved": Variant(
        "mistral", {"modules_to_save": ["lm_head", "embed_tokens"]}, "embed_tokens.weight"
    ),
    "head-saved-under-its-new-name": Variant("gpt_neox", {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "norms-saved": Variant("qwen2", {"modules_to_save": ["input_layernorm", "norm"]}, "input_layernorm.weight"),
    "embedding": Variant("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.lora_embedding_A"),
    "embedding-float16": Variant("gpt_neox", {"target_modules": ["embed_in"]}, "lora_embedding_B", dtype="float16"),
    "embedding-gpt2": Variant("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}, "wte.lora_embedding_A"),
    "embedding-dora": Variant("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "lora_magnitude_vector"),
    "head": Variant("llama", {"target_modules": ["lm_head", "q_proj"]}, "lm_head.lora_A.weight"),
    "head-under-its-new-name": Variant("gpt_neox", {"target_modules": ["lm_head", "dense"]}, "lm_head.lora_B.weight"),
    "tokens": Variant("llama", {"trainable_token_indices": [3, 7, 150]}, "embed_tokens.token_adapter"),
    "tokens-by-module": Variant(
        "qwen2", {"trainable_token_indices": {"embed_tokens": [150, 3], "lm_head": [5]}}, "lm_head.token_adapter"
    ),
    "tokens-tied": Variant("llama", {"trainable_token_indices": [7, 3, 162]}, "token_adapter", tied=True),
    "tokens-alone": Variant(
        "llama", {"trainable_token_indices": [0, 162], "target_modules": ["q_proj"]}, "token_adapter"
    ),
    "one-layer": Variant("llama", {"layers_to_transform": [1]}),
    "regex-targets": Variant("gemma2", {"target_modules": r".*layers\.0\..*(q_proj|down_proj)"}),
    "all-linear-but-some": Variant("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "gaussian": Variant("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": Variant("llama", {"init_lora_weights": "orthogonal", "r": 4}),
    "high-rank": Variant("llama", {"r": 67, "lora_alpha": 3}, dtype="float32"),
    "dora-patterns": Variant("gpt2", {"use_dora": True, "rank_pattern": {"c_fc": 6}}, "lora_magnitude_vector"),
    "pissa": Variant("llama", {"init_lora_weights": "pissa"}, exact_in_best=False, noise=0.02),
    "pissa-float32": Variant("qwen2", {"init_lora_weights": "pissa"}, dtype="float32", exact_in_best=False, noise=0.02),
    "pissa-gpt2": Variant("gpt2", {"init_lora_weights": "pissa"}, exact_in_best=False, noise=0.02),
    "pissa-rslora": Variant(
        "llama", {"init_lora_weights": "pissa", "use_rslora": True}, dtype="float16", exact_in_best=False, noise=0.02
    ),
    "olora": Variant("llama", {"init_lora_weights": "olora"}, exact_in_best=False, noise=0.02),
    "olora-float32": Variant("opt", {"init_lora_weights": "olora"}, dtype="float32", exact_in_best=False, noise=0.02),
}


@pytest.mark.parametrize("name", one_in(2, VARIANTS))
def test_variant_merges_to_pefts_bits_and_to_its_forward(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    base = oracle.make_base(tmp_path / "base", variant.family, dtype=variant.dtype, tied=variant.tied)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, noise=variant.noise, **variant.settings)
    assert any(variant.keys in key for key in adapter_tensors(adapter)), (
        "the adapter is not the variant it claims to be"
    )
    moved = variant.settings.get("init_lora_weights") in ("pissa", "olora")
    with one_thread() if moved else contextlib.nullcontext():
        expected = oracle.peft_merge(base, adapter)

    merged(adapter, tmp_path / "peft", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)

    merged(adapter, tmp_path / "best", "--base", base.path)
    found = oracle.read_tensors(tmp_path / "best")
    assert sorted(found) == sorted(expected)
    if variant.exact_in_best:
        for tensor, exact in oracle.reference64(base, [(adapter, 1.0)]).items():
            if "trainable_token_indices" in variant.settings and "embed" in tensor:
                continue
            ours, theirs = (oracle.errors_against(t[tensor], exact) for t in (found, expected))
            assert ours[0] <= theirs[0], tensor
            assert ours[1] <= theirs[1], tensor

    forward = oracle.peft_logits(base, adapter)
    assert oracle.effect(base, forward) > 3 * TOLERANCE[variant.dtype]
    said = oracle.logits(oracle.load_output(tmp_path / "best"), inputs_for(base))
    assert oracle.relative_difference(said, forward) < TOLERANCE[variant.dtype]
    assert oracle.read_config(tmp_path / "best")["tie_word_embeddings"] is variant.tied


CONVOLUTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "kernels-of-1-3-and-7": ("resnet", "float32", {}),
    "bfloat16": ("resnet", "bfloat16", {}),
    "float16": ("resnet", "float16", {"use_rslora": True}),
    "dora": ("resnet", "float32", {"use_dora": True}),
    "with-linear-and-a-head": ("convnext", "bfloat16", {"modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_merge_to_pefts_bits_and_to_its_forward(name: str, tmp_path: Path) -> None:
    kind, dtype, settings = CONVOLUTIONS[name]
    base = make_vision_base(tmp_path / "base", kind, dtype=dtype)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, **settings)
    assert any(t.dim() == 4 and t.shape[-1] > 1 for t in adapter_tensors(adapter).values())
    with one_thread():
        expected = oracle.peft_merge(base, adapter)
    merged(adapter, tmp_path / "peft", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)
    merged(adapter, tmp_path / "best", "--base", base.path)
    found = oracle.read_tensors(tmp_path / "best")
    for tensor, exact in oracle.reference64(base, [(adapter, 1.0)]).items():
        ours, theirs = (oracle.errors_against(t[tensor], exact) for t in (found, expected))
        assert ours[0] <= theirs[0], tensor
        assert ours[1] <= theirs[1], tensor
    forward = oracle.peft_logits(base, adapter)
    assert oracle.effect(base, forward) > 3 * TOLERANCE[dtype]
    said = oracle.logits(oracle.load_output(tmp_path / "best", base.auto), inputs_for(base))
    assert oracle.relative_difference(said, forward) < TOLERANCE[dtype]


def test_moved_base_given_as_it_was_left_needs_no_second_move(tmp_path: Path) -> None:
    """PiSSA over the residual base that training saved: plain LoRA on that base is what the trained model was."""
    import peft

    from oracle.bases import quiet

    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, init_lora_weights="pissa", noise=0.02)
    forward = oracle.peft_logits(base, adapter)
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(base.load(), adapter)
        wrapped.unload().save_pretrained(tmp_path / "residual")
    residual = dataclasses.replace(base, path=tmp_path / "residual")
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", residual.path, "--base-is-residual")
    assert ran.code == 0, ran.err
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(said, forward) < TOLERANCE["float32"]


def test_config_of_an_old_peft_with_few_fields_is_enough(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    config = oracle.read_config(adapter, "adapter_config.json")
    needed = ("peft_type", "r", "lora_alpha", "target_modules", "task_type")
    edit_config(adapter, "adapter_config.json", **{k: ... for k in config if k not in needed})
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_orientation_is_the_bases_whatever_fan_in_fan_out_says(family: str, tmp_path: Path) -> None:
    """PEFT corrects the flag with a warning; GPT-2's attention output is square, so its shape does not tell."""
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    said = oracle.read_config(adapter, "adapter_config.json")["fan_in_fan_out"]
    edit_config(adapter, "adapter_config.json", fan_in_fan_out=not said)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("value", [False, None, [], {}, 0, ""], ids=repr)
def test_an_unknown_field_that_says_nothing_is_no_obstacle(value: Any, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    edit_config(adapter, "adapter_config.json", use_a_method_of_next_year=value)
    merged(adapter, tmp_path / "out", "--base", base.path)


def test_base_comes_from_the_adapters_config_where_none_is_given(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    assert oracle.read_config(adapter, "adapter_config.json")["base_model_name_or_path"] == str(base.path)
    ran = merged(adapter, tmp_path / "out", "--numerics", "peft")
    assert str(base.path) in ran.text or base.path.name in ran.text
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.peft_merge(base, adapter))


def test_another_base_than_the_recorded_one_is_said_to_change_numbers(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    assert "changes-numbers" not in merged(adapter, tmp_path / "same", "--base", base.path).text
    edit_config(adapter, "adapter_config.json", base_model_name_or_path="meta-llama/Llama-3.1-8B")
    ran = merged(adapter, tmp_path / "other", "--base", base.path)
    assert "changes-numbers" in ran.text
    assert "meta-llama/Llama-3.1-8B" in ran.text


def test_inputs_are_left_as_they_were(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "in" / "base", sharded=True)
    adapter = oracle.make_adapter(tmp_path / "in" / "adapter", base)
    before = oracle.listing(tmp_path / "in")
    merged(adapter, tmp_path / "out", "--base", base.path)
    assert oracle.listing(tmp_path / "in") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
