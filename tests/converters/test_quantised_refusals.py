"""Quantised models that are not whole, formats that are not read: refused by name, nothing written, doctor tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantised
from converter.examine.doctor import DoctorRequest, examine
from doctored import codes, serious
from oracle.bases import edit_config, read_config
from oracle.command import listing, run
from quantised import Parts

Q = "model.layers.1.self_attn.q_proj"
W = f"{Q}.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"


def without(*names: str) -> Callable[[Parts], Parts]:
    return lambda t: {n: v for n, v in t.items() if n not in names}


def having(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], Parts]:
    return lambda t: {n: change(v) if n == name else v for n, v in t.items()}


def half(value: torch.Tensor) -> torch.Tensor:
    return value[: value.shape[0] // 2].clone()


def state(**changes: Any) -> Callable[[Parts], Parts]:
    def change(raw: torch.Tensor) -> torch.Tensor:
        held = json.loads(bytes(raw.tolist())) | changes
        return torch.tensor(list(json.dumps(held).encode()), dtype=torch.uint8)

    return having(STATE, change)


HARMED: dict[str, tuple[str, Callable[[Parts], Parts]]] = {
    "fp8-no-scale": ("fp8-blocks", without(f"{W}_scale_inv")),
    "fp8-scale-halved": ("fp8-blocks", having(f"{W}_scale_inv", half)),
    "fp8-scale-of-one": ("fp8-blocks", having(f"{W}_scale_inv", lambda v: v[:1, :1].clone())),
    "fp8-scale-of-integers": ("fp8-blocks", having(f"{W}_scale_inv", lambda v: v.to(torch.int32))),
    "fp8-weight-halved": ("fp8-blocks", having(W, half)),
    "fp8-scale-of-a-whole-weight": ("fp8-blocks", having(W, lambda v: v.to(torch.bfloat16))),
    "fp8-weight-missing": ("fp8-blocks", without(W)),
    "fp8-e5m2": ("fp8-blocks", having(W, lambda v: v.float().to(torch.float8_e5m2))),
    "nf4-no-absmax": ("nf4", without(f"{W}.absmax")),
    "nf4-no-state": ("nf4", without(STATE)),
    "nf4-bytes-alone": ("nf4", without(STATE, f"{W}.absmax", f"{W}.quant_map")),
    "nf4-no-map": ("nf4", without(f"{W}.quant_map")),
    "nf4-absmax-halved": ("nf4", having(f"{W}.absmax", half)),
    "nf4-bytes-halved": ("nf4", having(W, half)),
    "nf4-no-weight": ("nf4", without(W)),
    "nested-no-absmax": ("nf4-nested", without(f"{W}.nested_absmax")),
    "nested-no-map": ("nf4-nested", without(f"{W}.nested_quant_map")),
    "nested-absmax-of-floats": ("nf4-nested", having(f"{W}.absmax", lambda v: v.float())),
    "int8-no-scale": ("int8", without(f"{Q}.SCB")),
    "int8-scale-halved": ("int8", having(f"{Q}.SCB", half)),
    "gptq-no-scales": ("gptq", without(f"{Q}.scales")),
    "gptq-no-zeros": ("gptq", without(f"{Q}.qzeros")),
    "gptq-no-words": ("gptq", without(f"{Q}.qweight")),
    "gptq-words-halved": ("gptq", having(f"{Q}.qweight", half)),
    "gptq-zeros-halved": ("gptq", having(f"{Q}.qzeros", half)),
    "gptq-order-halved": ("gptq", having(f"{Q}.g_idx", half)),
    "awq-no-scales": ("awq", without(f"{Q}.scales")),
    "awq-words-halved": ("awq", having(f"{Q}.qweight", half)),
    "packed-no-scale": ("packed", without(f"{Q}.weight_scale")),
    "packed-no-shape": ("packed", without(f"{Q}.weight_shape")),
    "packed-words-halved": ("packed", having(f"{Q}.weight_packed", half)),
    "channel-no-scale": ("fp8-channel", without(f"{Q}.weight_scale")),
    "channel-scale-halved": ("fp8-channel", having(f"{Q}.weight_scale", half)),
}
"""Folders that lack a part or have one of another shape: headers show it."""

LYING: dict[str, tuple[str, Callable[[Parts], Parts]]] = {
    "nf4-state-of-another-shape": ("nf4", state(shape=[64, 63])),
    "nf4-state-turned": ("nf4", state(shape=[32, 128])),
    "nf4-state-of-other-blocks": ("nf4", state(blocksize=128)),
    "nf4-state-of-odd-blocks": ("nf4", state(blocksize=65)),
    "nf4-state-says-fp4": ("nf4", state(quant_type="fp4")),
    "nf4-state-is-no-json": ("nf4", having(STATE, lambda v: v.flip(0))),
    "nf4-state-says-nested": ("nf4", state(nested_blocksize=256, nested_offset=0.5)),
    "nested-offset-not-finite": ("nf4-nested", state(nested_offset=float("inf"))),
    "int8-for-a-gpu": ("int8", having(f"{Q}.weight_format", torch.ones_like)),
    "gptq-zero-overflowed": ("gptq", having(f"{Q}.qzeros", lambda v: torch.full_like(v, -1))),
    "gptq-group-past-the-scales": ("gptq", having(f"{Q}.g_idx", lambda v: v + 4)),
    "gptq-negative-group": ("gptq", having(f"{Q}.g_idx", lambda v: v - 1)),
    "packed-shape-of-another": ("packed", having(f"{Q}.weight_shape", lambda v: v + 8)),
}
"""Folders whose values contradict each other: only reading them shows it."""

FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "torchao": ("fp8-blocks", {"quant_method": "torchao"}),
    "hqq": ("fp8-blocks", {"quant_method": "hqq"}),
    "eetq": ("int8", {"quant_method": "eetq"}),
    "aqlm": ("gptq", {"quant_method": "aqlm"}),
    "quark": ("fp8-channel", {"quant_method": "quark"}),
    "fbgemm": ("fp8-channel", {"quant_method": "fbgemm_fp8"}),
    "gptq-marlin": ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "marlin"}),
    "gptq-dynamic": ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 16, "dynamic": {"-:x": {}}}),
    "awq-gemv": ("awq", {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}),
    "mxfp6": ("packed", {"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"}),
    "modelopt": ("fp8-channel", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "rotated": (
        "packed", {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"a": 1}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: quantised.make(tmp_path_factory.mktemp(kind), kind).path for kind in quantised.KINDS}


def refused(folder: Path, *options: str) -> str:
    out = folder.parent / "out"
    before = listing(folder.parent)
    ran = run("reshard", folder, out, *options)
    assert (ran.code, listing(folder.parent)) == (3, before), ran.text
    return ran.text


@pytest.mark.parametrize("case", HARMED)
def test_weights_without_a_part_are_refused_by_every_road_and_found_by_doctor(
    case: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    kind, change = HARMED[case]
    folder = shutil.copytree(sound[kind], tmp_path / "model")
    quantised.change(folder, change)
    for options in (("--dequantize",), ()):
        text = refused(folder, *options)
        assert "quantised-incomplete" in text and "layers.1.self_attn.q_proj" in text
    assert codes(folder)["quantised-incomplete"] == "error"


@pytest.mark.parametrize("case", LYING)
def test_parts_that_contradict_each_other_are_refused(case: str, sound: dict[str, Path], tmp_path: Path) -> None:
    kind, change = LYING[case]
    folder = shutil.copytree(sound[kind], tmp_path / "model")
    quantised.change(folder, change)
    text = refused(folder, "--dequantize")
    expected = ("quantised-incomplete", "quantised-unsupported", "tensors-misshapen")
    assert any(code in text for code in expected) and "layers.1.self_attn.q_proj" in text
    if "quantised-unsupported" not in text:  # else nobody here can tell what a copy would be
        assert "layers.1.self_attn.q_proj" in refused(folder)


def test_a_layout_that_bitsandbytes_refuses_is_not_copied(sound: dict[str, Path], tmp_path: Path) -> None:
    """Its `Linear8bitLt` raises ValueError for a weight_format but 0; transformers 5.23 loads the tiles as rows."""
    folder = shutil.copytree(sound["int8"], tmp_path / "model")
    quantised.change(folder, having(f"{Q}.weight_format", torch.ones_like))
    assert "weight_format" in refused(folder) and "quantised-incomplete" in refused(folder)
    deep = {f.code: f.severity for f in examine(DoctorRequest(str(folder), deep=True)).findings}
    assert deep["quantised-incomplete"] == "error"


def test_zero_points_that_programs_read_apart_are_copied_and_named(sound: dict[str, Path], tmp_path: Path) -> None:
    """GPTQModel adds the one to the packed word, others to each zero point: which is meant is in no file."""
    folder = shutil.copytree(sound["gptq"], tmp_path / "model")
    quantised.change(folder, having(f"{Q}.qzeros", lambda v: torch.full_like(v, -1)))
    ran = run("reshard", folder, tmp_path / "out")
    assert (ran.code, f"{Q}.qzeros has a zero point of 0" in ran.text) == (0, True)
    deep = {f.code: f.severity for f in examine(DoctorRequest(str(folder), deep=True)).findings}
    assert deep["quantised-incomplete"] == "cosmetic"


@pytest.mark.parametrize("case", FOREIGN)
def test_formats_that_are_not_read_are_refused_by_name(case: str, sound: dict[str, Path], tmp_path: Path) -> None:
    kind, config = FOREIGN[case]
    folder = shutil.copytree(sound[kind], tmp_path / "model")
    edit_config(folder, quantization_config=config)
    assert "quantised-unsupported" in refused(folder, "--dequantize")


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_a_sound_quantised_folder_has_no_finding(kind: str, sound: dict[str, Path]) -> None:
    assert serious(codes(sound[kind])) == set()


def test_a_method_that_is_not_recorded_is_not_guessed(sound: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sound["gptq"], tmp_path / "model")
    edit_config(folder, quantization_config=...)
    assert "quantization_config" not in read_config(folder)
    assert "not recorded" in refused(folder, "--dequantize")
