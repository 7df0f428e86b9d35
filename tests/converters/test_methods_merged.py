"""Every PEFT method that can be merged, against PEFT's own merge, its merge in fp64 and its unmerged forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
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
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("name", marked(CASES, OFTEN))
def test_method_merges_to_pefts_bits_and_to_its_forward(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = make_method_base(tmp_path / "base", case.family, case.dtype)
    adapter = make_method_adapter(tmp_path / "adapter", base, case.kind, **dict(case.settings))
    with one_thread():
        expected = oracle.peft_merge(base, adapter)

    merged(adapter, tmp_path / "peft", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)

    merged(adapter, tmp_path / "best", "--base", base.path)
    found = oracle.read_tensors(tmp_path / "best")
    assert sorted(found) == sorted(expected)
    if case.exact:
        _expect_never_farther(found, expected, oracle.peft_merge(base, adapter, dtype=torch.float64))

    forward = oracle.peft_logits(base, adapter, inputs=inputs_for(base))
    assert oracle.effect(base, forward) > 0, "the adapter does nothing: the case tests nothing"
    said = oracle.logits(oracle.load_output(tmp_path / "best", base.auto), inputs_for(base))
    assert oracle.relative_difference(said, forward) < TOLERANCE[case.dtype]


def _expect_never_farther(found: dict[str, Any], theirs: dict[str, Any], exact: dict[str, Any]) -> None:
    """`best` is the nearest value to the fp64 reference, or what PEFT writes is not a nearer either."""
    for name, reference in exact.items():
        if not reference.is_floating_point():
            continue
        ours, peft = (oracle.errors_against(t[name], reference.double()) for t in (found, theirs))
        assert ours[0] <= peft[0] * (1 + 1e-6), name
        assert ours[1] <= peft[1] * (1 + 1e-6), name
