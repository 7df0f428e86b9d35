"""LoRA and its variants in fp64, computed from the files alone: neither PEFT nor the code under test takes part."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oracle.adapters import adapter_tensors
from oracle.bases import Base, read_config, read_tensors

_CONV1D = {"gpt2"}  # weights are stored [in, out]


def reference64(base: Base, adapters: Sequence[tuple[Path, float]]) -> dict[str, Any]:
    """Every tensor that the adapters compute, `[out, in]` or as the base stores it, in fp64 and unrounded.

    Replaced tensors (whole modules, biases) are not among them: there is nothing to round.
    """
    stored = read_tensors(base.path)
    result: dict[str, Any] = {}
    for path, weight in adapters:
        config = read_config(path, "adapter_config.json")
        tensors = {k.removeprefix("base_model.model."): v.double() for k, v in adapter_tensors(path).items()}
        conv1d = read_config(base.path)["model_type"] in _CONV1D
        for key, a in tensors.items():
            module, marker, _ = key.rpartition(".lora_A.weight")
            if not marker:
                module, marker, _ = key.rpartition(".lora_embedding_A")
            if not marker:
                continue
            name = _on_disk(f"{module}.weight", stored)
            original = stored[name].double()
            before = result.get(name, original)
            scale = _scale(config, module)
            if marker == ".lora_embedding_A":
                delta = (tensors[f"{module}.lora_embedding_B"] @ a).T * scale
                across = 0
            else:
                delta = _matrix(tensors[f"{module}.lora_B.weight"], a) * scale
                across = 1
            turned = conv1d and marker == ".lora_A.weight" and "lm_head" not in name
            if turned:
                delta = delta.T
            magnitude = tensors.get(f"{module}.lora_magnitude_vector")
            if magnitude is None:
                result[name] = before + weight * delta
            else:
                assert weight == 1, "DoRA is not linear"
                # By the norm over the unmerged base, and over what stands there: as PEFT's forward does in turn.
                result[name] = _factor(original + delta, magnitude, 0 if turned else across) * (before + delta)
            if (bias := tensors.get(f"{module}.lora_B.bias")) is not None:
                at = _on_disk(f"{module}.bias", stored)
                result[at] = result.get(at, stored[at].double()) + weight * bias * scale
    return result


def rounded(exact: Any, dtype: Any) -> Any:
    """fp64 rounded to a dtype once; torch's own cast to 16 bits goes through fp32 and rounds twice."""
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[dtype]
    best = exact.to(dtype)
    for step in (-1, 1):
        other = (best.view(bits) + step).view(dtype)
        nearer = (other.double() - exact).abs() < (best.double() - exact).abs()
        best = torch.where(nearer, other, best)
    return best


def _matrix(b: Any, a: Any) -> Any:
    return b @ a if a.dim() == 2 else torch.einsum("or,ri...->oi...", b.flatten(1), a)


def _factor(moved: Any, magnitude: Any, across: int) -> Any:
    if moved.dim() > 2:
        norm = moved.flatten(1).norm(dim=1).view(-1, *[1] * (moved.dim() - 1))
    else:
        norm = moved.norm(dim=across, keepdim=True)
    return magnitude.view(norm.shape) / norm


def _scale(config: dict[str, Any], module: str) -> float:
    r = _patterned(config.get("rank_pattern"), module, config["r"])
    alpha = _patterned(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def _patterned(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _on_disk(name: str, stored: dict[str, Any]) -> str:
    """The stored name of a parameter: itself, without the backbone's prefix, or GPT-NeoX's old name of its head."""
    for candidate in (name, name.partition(".")[2], name.replace("lm_head.", "embed_out.")):
        if candidate in stored:
            return candidate
    raise AssertionError(f"no stored tensor for {name}")
