"""Families whose modules have other names in memory than on disk: the merge is PEFT's, in the names on disk.

Where PEFT drops what it does not know (keys of transformers 4 over a ViT or a Qwen2-MoE), the expected value is PEFT's
merge of the same factors under today's names, or arithmetic.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import oracle
from converter.converters.merge.orientation import is_conv1d
from converter.families import memory_names
from oracle.bases import quiet, write_tensors
from oracle.command import merged
from oracle.expected import inputs_for
from oracle.families import CASES, EXPERTS, RENAMED, make_family, marked, tie

CLOSE = 4e-6
PLAIN = "base_model.model."
OFTEN = {"llava", "gemma3", "qwen2_5_vl", "vit", "mixtral", "qwen3_moe", "phi3", "falcon", "bloom", "t5", "gpt_neox"}
ON_DISK = [name for name, case in CASES.items() if case.disk]


@pytest.mark.parametrize("family", marked(CASES, OFTEN))
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_family_merges_to_pefts_bits_in_the_names_on_disk(family: str, dtype: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", family, dtype=dtype)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    stored = oracle.read_tensors(base.path)
    modules = {re.sub(r"\.lora_[AB]\.weight$", "", k) for k in load_file(adapter / "adapter_model.safetensors")}
    changed = [name for name, value in expected.items() if name in stored and not value.equal(stored[name])]
    assert len(changed) == len([m for m in modules if "base_layer" not in m]), "PEFT itself did not merge everything"
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "vit", "mixtral"])
def test_family_says_what_the_unmerged_peft_model_says(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, use_rslora=True)
    merged(adapter, tmp_path / "out", "--base", base.path)
    inputs = inputs_for(base)
    forward = oracle.peft_logits(base, adapter, inputs=inputs)
    assert oracle.effect(base, forward, inputs=inputs) > 0.1
    found = oracle.logits(oracle.load_output(tmp_path / "out", base.auto), inputs)
    assert oracle.relative_difference(found, forward) < CLOSE


@pytest.mark.parametrize("family", marked(ON_DISK, {"llava", "qwen2_5_vl", "vit", "gpt_neox", "phimoe"}))
def test_adapter_of_transformers_4_merges_like_the_same_one_of_5(family: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    older = oracle.rewrite_adapter(adapter, tmp_path / "older", rename=CASES[family].on_disk)
    stored = oracle.read_tensors(base.path)
    keys = [k for k in load_file(older / "adapter_model.safetensors") if ".lora_A." in k]
    assert all(k.removeprefix(PLAIN).replace(".lora_A", "") in stored for k in keys), "these are not the names on disk"
    ran = merged(older, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    assert "in memory" not in ran.text
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


def test_older_adapter_fits_a_base_that_is_stored_under_the_names_in_memory(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llava")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    with quiet():
        state = {k: v.clone() for k, v in base.load().state_dict().items()}
    write_tensors(base.path, state)
    expected = oracle.peft_merge(base, adapter)
    older = oracle.rewrite_adapter(adapter, tmp_path / "older", rename=CASES["llava"].on_disk)
    ran = merged(older, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    assert "earlier names" in ran.text
    assert sorted(expected) == sorted(state)
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


def test_rule_for_names_in_memory_is_printed_with_the_class(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llava")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    ran = merged(adapter, tmp_path / "out", "--base", base.path, "--dry-run")
    assert "LlavaForConditionalGeneration of transformers 5" in ran.text


def test_base_saved_from_scratch_without_the_vision_towers_inner_name(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llava", hub=False)
    assert not any("vision_model" in name for name in oracle.read_tensors(base.path))
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.peft_merge(base, adapter))


def test_patterns_match_the_names_in_memory(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llava")
    adapter = oracle.make_adapter(
        tmp_path / "adapter",
        base,
        rank_pattern={r"model.language_model.layers.0.self_attn.q_proj": 5, r"^model.vision_tower.*v_proj": 2},
        alpha_pattern={r"multi_modal_projector.linear_1": 11, r"language_model.*down_proj": 2},
    )
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.peft_merge(base, adapter))


def test_whole_modules_are_replaced_under_their_names_on_disk(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llava")
    adapter = oracle.make_adapter(
        tmp_path / "adapter",
        base,
        target_modules=r".*language_model.*\.q_proj",
        modules_to_save=["multi_modal_projector", "embed_tokens", "lm_head"],
    )
    expected = oracle.peft_merge(base, adapter)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)
    before = oracle.read_tensors(base.path)
    assert not expected["multi_modal_projector.linear_2.bias"].equal(before["multi_modal_projector.linear_2.bias"])


@pytest.mark.parametrize("target", ["lm_head", r".*\.embed_tokens"])
@pytest.mark.parametrize("family", marked(["gemma3", "qwen2_vl", "llava", "paligemma"], {"gemma3", "qwen2_vl"}))
def test_one_side_of_a_tie_is_untied_under_the_names_on_disk(family: str, target: str, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", family, change=tie)
    heads = [name for name in oracle.read_tensors(base.path) if "lm_head" in name]
    assert not heads
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=rf".*\.q_proj|{target}")
    merged(adapter, tmp_path / "out", "--base", base.path)
    inputs = inputs_for(base)
    forward = oracle.peft_logits(base, adapter, inputs=inputs)
    model = oracle.load_output(tmp_path / "out", base.auto)
    assert oracle.relative_difference(oracle.logits(model, inputs), forward) < CLOSE
    name = "lm_head.weight" if family == "qwen2_vl" else "language_model.lm_head.weight"
    assert name in oracle.read_tensors(tmp_path / "out")


def test_backbone_alone_keeps_its_names(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "llava", auto="AutoModel")
    before = oracle.read_tensors(base.path)
    assert not any(name.startswith("model.") for name in before)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=r".*language_model.*\.q_proj")
    merged(adapter, tmp_path / "out", "--base", base.path)
    found = oracle.read_tensors(tmp_path / "out")
    assert sorted(found) == sorted(before)
    changed = sorted(name for name, value in found.items() if not value.equal(before[name]))
    assert changed == [f"language_model.model.layers.{n}.self_attn.q_proj.weight" for n in range(2)]


# Mixtures of experts


@pytest.mark.parametrize(("family", "experts"), [("mixtral", "block_sparse_moe.experts"), ("qwen2_moe", "mlp.experts")])
def test_adapter_of_transformers_4_on_single_experts_is_plain_arithmetic(
    family: str, experts: str, tmp_path: Path
) -> None:
    """PEFT's own merge of this one on Qwen2-MoE leaves the experts as they were, without a word."""
    base = make_family(tmp_path / "base", family)
    stored = oracle.read_tensors(base.path)
    attention = oracle.make_adapter(tmp_path / "attention", base)
    expected = oracle.peft_merge(base, attention)
    names = [n for n in stored if f"{experts}.1." in n or f"{experts}.3." in n]
    assert len(names) == 2 * 2 * 3
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: (torch.randn(3, stored[name].shape[1], generator=generator), torch.randn(stored[name].shape[0], 3))
        for name in names
    }

    def add(tensors: dict[str, Any]) -> None:
        for name, (a, b) in factors.items():
            module = PLAIN + name.removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}

    adapter = oracle.rewrite_adapter(attention, tmp_path / "adapter", change=add)
    for name, (a, b) in factors.items():
        expected[name] = stored[name] + torch.mm(b, a) * (5 / 3)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


# The data


def test_data_is_what_the_installed_transformers_says() -> None:
    make = pytest.importorskip("make_memory_names")
    if make.transformers.__version__ != memory_names.version():
        pytest.skip("another transformers is installed than the data was taken from")
    assert memory_names.table()["rules"] == make.rules()


@pytest.mark.parametrize("family", [*RENAMED, *EXPERTS, "bert", "whisper", "t5"])
def test_transforms_of_a_model_are_those_of_transformers_in_its_order(family: str) -> None:
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    if transformers.__version__ != memory_names.version():
        pytest.skip("another transformers is installed than the data was taken from")
    case = CASES[family]
    with quiet(), torch.device("meta"):
        model = getattr(transformers, case.auto).from_config(case.config())
    expected = [
        (t.compiled_sources.pattern, tuple(t.target_patterns), t.scope_prefix)
        for t in get_model_conversion_mapping(model)
    ]
    found = memory_names.architecture(type(model).__name__, model.config.to_dict())
    assert found is not None
    assert [(t.pattern.pattern, t.targets, t.scope) for t in found.transforms] == expected
    assert found.prefix == model.base_model_prefix


def test_no_conversion_of_values_keeps_the_name_of_a_weight() -> None:
    """Else `names as in the base` would be accepted for a weight with other values in memory; experts are refused."""
    for name, rows in memory_names.table()["rules"].items():
        for kind, pattern, *rest in rows:
            if kind == "convert":
                kept = [target for target in rest[:-1] if re.search(pattern, target) and "experts" not in target]
                assert not kept, (name, kept)


@pytest.mark.parametrize(
    ("name", "config", "answer"),
    [
        ("h.0.attn.c_proj.weight", {"model_type": "gpt2"}, True),
        ("score.weight", {"model_type": "gpt2"}, False),
        ("transformer.h.0.attn.c_proj.weight", {"model_type": "gpt_bigcode"}, False),
        ("transformer.h.0.attn.q_attn.weight", {"model_type": "imagegpt"}, True),
        ("encoder.h.0.crossattention.c_proj.weight", {"model_type": "decision_transformer"}, True),
        ("speech_decoder_model.model.decoder.layers.0.mlp.c_fc.weight", {"model_type": "clvp"}, True),
        ("speech_decoder_model.model.decoder.layers.0.attn.q_proj.weight", {"model_type": "clvp"}, False),
        (
            "decoder.transformer.h.0.attn.c_proj.weight",
            {
                "model_type": "vision-encoder-decoder",
                "encoder": {"model_type": "vit"},
                "decoder": {"model_type": "gpt2"},
            },
            True,
        ),
        (
            "encoder.h.0.attn.c_proj.weight",
            {"model_type": "encoder-decoder", "encoder": {"model_type": "gpt_neo"}, "decoder": {"model_type": "gpt2"}},
            False,
        ),
    ],
)
def test_orientation_of_square_weights_is_known_by_family_and_module(name: str, config: Any, answer: bool) -> None:
    assert is_conv1d(name, config) is answer
