"""Weights that vendors quantised, with what each vendor's own code makes of them, and a folder for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from converter.core.checkpoint import Checkpoint
from converter.sources.hf.source import SOURCE
from places import RUNS

VENDORS = RUNS / "quantised" / "vendors.safetensors"
"""Made by `tests/trainers/quantise_with_vendors.py` with bitsandbytes, compressed-tensors, GPTQModel and AutoAWQ."""

with safe_open(VENDORS, "pt") as _file:
    SETTINGS: dict[str, dict[str, Any]] = json.loads(_file.metadata()["cases"])

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def quantised_model(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    """A folder with these tensors, opened."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return SOURCE.open(folder, asked=str(folder), revision=None, keep_code=False)


def of_case(case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """The parts of a case under a module's name, what the vendor makes of them, and a config."""
    with safe_open(VENDORS, "pt") as file:
        held = {n.partition("/")[2]: file.get_tensor(n) for n in file.keys() if n.startswith(f"{case}/")}  # noqa: SIM118
    expected = held.pop("whole")
    settings = SETTINGS[case]
    dtype = TORCH_NAMES[settings["dtype"]] if "dtype" in settings else str(expected.dtype).removeprefix("torch.")
    config = {"quantization_config": {"quant_method": settings["method"], **settings.get("config", {})}, "dtype": dtype}
    return {f"m.{n}": t for n, t in held.items()}, expected, config
