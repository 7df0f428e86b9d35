"""One part of a quantised weight lost, halved, retyped or zeroed is named; no verb copies what would read as noise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from oracle.bases import read_tensors, write_tensors
from quantised import KINDS, make

MODULE = "model.layers.0.self_attn.q_proj"
PARTS = {
    "fp8-blocks": ("weight_scale_inv",),
    "nf4": ("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    "nf4-nested": (
        "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    ),
    "int8": ("SCB",),
    "gptq": ("qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_scale", "weight_shape"),
    "fp8-channel": ("weight_scale",),
    "nvfp4": ("weight_scale", "weight_global_scale"),
    "mxfp4-rows": ("weight_scale",),
}  # fmt: skip
MAY_BE_ZERO = ("qzeros", "g_idx", "weight_shape", "weight.quant_state.bitsandbytes__nf4")


def halved(value: torch.Tensor) -> torch.Tensor | None:
    dims = [d for d, size in enumerate(value.shape) if size > 1]
    return value.narrow(dims[-1], 0, value.shape[dims[-1]] // 2).clone() if dims else None


def retyped(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.int16 if value.is_floating_point() else torch.float32)


HARMS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "removed": lambda value: None, "halved": halved, "retyped": retyped,
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sound(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(kind), kind).path


def harmed(sound: Path, out: Path, part: str, value: torch.Tensor | None) -> Path:
    shutil.copytree(sound, out)
    tensors = {n: t for n, t in read_tensors(sound).items() if n != f"{MODULE}.{part}"}
    write_tensors(out, tensors | ({} if value is None else {f"{MODULE}.{part}": value}))
    return out


def named(folder: Path, *, deep: bool = False) -> str:
    found = examine(DoctorRequest(str(folder), deep=deep)).findings
    return " ".join(f"{f.text} {f.tensors}" for f in found if f.severity != "cosmetic")


def test_what_is_whole_has_no_finding(sound: Path) -> None:
    assert named(sound, deep=True) == ""


@pytest.mark.parametrize("harm", HARMS)
def test_a_part_that_does_not_fit_is_named_and_not_copied(
    kind: str, harm: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in PARTS[kind]:
        value = HARMS[harm](read_tensors(sound)[f"{MODULE}.{part}"])
        if value is None and harm != "removed":
            continue  # one value has no half
        folder = harmed(sound, tmp_path / part, part, value)
        assert MODULE in named(folder), part
        assert main(["reshard", str(folder), str(tmp_path / "out"), "--dry-run"]) == 3, part
        assert MODULE in capsys.readouterr().err


def test_scales_and_tables_of_zeros_are_named_by_their_values(kind: str, sound: Path, tmp_path: Path) -> None:
    for part in PARTS[kind]:
        if part in MAY_BE_ZERO:
            continue
        folder = harmed(sound, tmp_path / part, part, torch.zeros_like(read_tensors(sound)[f"{MODULE}.{part}"]))
        assert MODULE in named(folder, deep=True), part


def test_a_weight_without_the_order_that_the_others_have_is_named(tmp_path: Path) -> None:
    sound = make(tmp_path / "made", "gptq").path
    folder = harmed(sound, tmp_path / "it", "g_idx", None)
    assert f"{MODULE}.g_idx is not there" in named(folder)
