"""The methods room: which method a config means, and what becomes of updates that are not of one kernel."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from converter import DType, Refused, TensorInfo, to_torch
from converter.converters.merge.layer import merged
from converter.converters.merge.methods import finding
from converter.converters.merge.methods.dora import METHOD as DORA
from converter.converters.merge.methods.lora import METHOD as LORA
from converter.converters.merge.methods.method import Update
from converter.core.tensors import kernel_specs, nodes
from converter.core.tensors.nodes import LazyTensor
from converter.families.factors import factor_names, factor_pairs, zero_factors


def stored(file: Path, tensor: torch.Tensor) -> LazyTensor:
    file.write_bytes(tensor.contiguous().numpy().tobytes())
    return nodes.stored(TensorInfo(DType.F32, tuple(tensor.shape)), str(file), 0)


def lora(a: LazyTensor, b: LazyTensor, scale: float, *, joins: bool, numerics: str = "best") -> Update:
    params: dict[str, kernel_specs.Param] = {
        "scales": (scale,), "dora": (False,), "numerics": numerics, "out": "BF16", "transposed": False,
        "delta_rounded": False,
    }  # fmt: skip
    return Update(kernel_specs.LORA_MERGE, (a, b), params, joins=joins, scale=scale)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.fixture
def parts(tmp_path: Path) -> tuple[LazyTensor, list[tuple[LazyTensor, LazyTensor]], torch.Tensor]:
    """A bf16 weight, two adapters' factors, and the sum of all in fp64."""
    weight = drawn(70, 40, seed=0)
    pairs = [(drawn(3, 40, seed=n), drawn(70, 3, seed=9 + n)) for n in (1, 2)]
    exact = weight.bfloat16().double() + sum(0.7 * (b.double() @ a.double()) for a, b in pairs)
    lazy = [(stored(tmp_path / f"a{n}", a), stored(tmp_path / f"b{n}", b)) for n, (a, b) in enumerate(pairs)]
    return nodes.cast(stored(tmp_path / "w", weight), DType.BF16), lazy, exact


@pytest.mark.parametrize("joins", [True, False], ids=["one kernel", "one after another"])
def test_best_rounds_once_whether_or_not_updates_can_be_taken_together(parts, joins: bool) -> None:
    weight, pairs, exact = parts
    made = merged(weight, [lora(a, b, 0.7, joins=joins) for a, b in pairs], "best")
    assert made.info.dtype is DType.BF16
    # fp32 accumulation may fall to the other side of a tie in a few elements; a second rounding misses hundreds.
    assert (to_torch(made) != exact.bfloat16()).sum() <= 2


def test_peft_rounds_after_each_update_that_stands_alone(parts) -> None:
    weight, pairs, _ = parts
    made = merged(weight, [lora(a, b, 0.7, joins=False, numerics="peft") for a, b in pairs], "peft")
    expected = to_torch(weight)
    for a, b in pairs:
        expected = (expected.float() + (to_torch(b) @ to_torch(a)) * 0.7).bfloat16()
    assert torch.equal(to_torch(made), expected)


def test_updates_of_one_kernel_are_one_node_and_others_are_two(parts) -> None:
    weight, pairs, _ = parts
    one, two = (merged(weight, [lora(a, b, 0.7, joins=j) for a, b in pairs], "best") for j in (True, False))
    assert isinstance(one, nodes.Apply) and len(one.inputs) == 5
    assert isinstance(two, nodes.Apply) and isinstance(two.inputs[0], nodes.Apply)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"peft_type": "LORA"}, LORA),
        ({"peft_type": "LORA", "use_dora": False}, LORA),
        ({"peft_type": "LORA", "use_dora": True}, DORA),
    ],
)
def test_a_switch_makes_the_variant_of_a_type(config: dict[str, object], method: object) -> None:
    assert finding.find_method(config, "here") is method


def test_two_switches_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(LORA, title="other", switch="use_other")
    monkeypatch.setattr(finding, "_of_type", lambda kind: (LORA, DORA, other))
    with pytest.raises(Refused, match="`use_dora` and `use_other` are set"):
        finding.find_method({"peft_type": "LORA", "use_dora": True, "use_other": True}, "here")


@pytest.mark.parametrize(
    ("config", "code", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft-type-unmergeable", "it is a trained prompt"),
        ({"peft_type": "NOBODYS"}, "peft-type-unsupported", "NOBODYS is not supported; read are ADALORA"),
        ({}, "peft-type-unsupported", "missing is not supported"),
    ],
)
def test_a_type_without_a_method_is_refused_by_name(config: dict[str, object], code: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        finding.find_method(config, "here")
    assert caught.value.code == code


def test_names_of_all_methods_tensors_are_known_in_one_place() -> None:
    assert set(factor_names()) >= {
        "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    }  # fmt: skip
    assert ("lora_A", "lora_B") in factor_pairs()
    assert "lora_B" in zero_factors() and "lora_A" not in zero_factors()
