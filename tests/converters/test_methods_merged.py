"""Every PEFT method that can be merged, against PEFT's own merge, its merge in fp64 and its unmerged forward pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.adapters import CONFIG
from oracle.bases import edit_config
from oracle.command import merged
from oracle.expected import inputs_for, one_thread
from oracle.families import marked
from oracle.method_cases import method_cases
from oracle.methods import make_method_adapter, make_method_base

CASES = method_cases()
OFTEN = (
    "adalora-1-gpt2-float32", "ia3-1-qwen2-bfloat16", "loha-1-resnet-bfloat16", "lokr-2-llama-float32",
    "oft-1-qwen2-bfloat16", "lntuning-2-bert-bfloat16", "vera-2-gpt2-float32", "miss-1-opt-bfloat16",
    "vblora-2-gpt2-bfloat16", "road-3-qwen2-bfloat16",
)  # fmt: skip
SAID = 1e-4
"""How far logits may be from those of the unmerged model, where neither rounds. Rounding to bf16 says nothing of a
merge: an update of fifty times the base, rounded, turns the attention of these tiny models over (0.4, measured)."""
DRAWN_ANEW = 0.1
"""The same where PEFT draws what it does not save in the base's dtype, which is another for the unmerged model here."""


def laid_anew(model: Any) -> Any:
    """The weights at places of their own: products with a vector depend on where in a cache line a weight begins."""
    for value in model.parameters():
        value.data = value.data.clone()
    return model


@pytest.mark.parametrize("name", marked(CASES, OFTEN))
def test_method_merges_to_pefts_bits_and_to_its_forward(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = make_method_base(tmp_path / "base", case.family, case.dtype)
    adapter = make_method_adapter(tmp_path / "adapter", base, case.kind, **dict(case.settings))
    with one_thread():
        expected = oracle.peft_merge(base, adapter, prepare=laid_anew)

    merged(adapter, tmp_path / "peft", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)

    merged(adapter, tmp_path / "best", "--base", base.path)
    found = oracle.read_tensors(tmp_path / "best")
    assert sorted(found) == sorted(expected)
    if case.exact:
        reference = oracle.peft_merge(base, _in_fp64(adapter, tmp_path / "fp64"), dtype=torch.float64)
        _expect_never_farther(found, expected, reference)

    forward = oracle.peft_logits(base, adapter, inputs=inputs_for(base))
    assert oracle.effect(base, forward) > 0, "the adapter does nothing: the case tests nothing"
    merged(adapter, tmp_path / "wide", "--base", base.path, "--dtype", "float32")
    said = oracle.logits(oracle.load_output(tmp_path / "wide", base.auto), inputs_for(base))
    tolerance = SAID if case.exact or case.dtype == "float32" else DRAWN_ANEW
    assert oracle.relative_difference(said, forward) < tolerance


def _in_fp64(adapter: Path, path: Path) -> Path:
    """The adapter as PEFT takes it over a base in fp64: it does not make MiCA's start there, which a file replaces."""
    shutil.copytree(adapter, path)
    if oracle.read_config(path, CONFIG).get("init_lora_weights") == "mica":
        edit_config(path, CONFIG, init_lora_weights=True)
    return path


def _expect_never_farther(found: dict[str, Any], theirs: dict[str, Any], exact: dict[str, Any]) -> None:
    """`best` is the nearest value to the fp64 reference, or what PEFT writes is not a nearer either."""
    for name, reference in exact.items():
        if not reference.is_floating_point():
            continue
        ours, peft = (oracle.errors_against(t[name], reference.double()) for t in (found, theirs))
        assert ours[0] <= peft[0] * (1 + 1e-6), name
        assert ours[1] <= peft[1] * (1 + 1e-6), name
