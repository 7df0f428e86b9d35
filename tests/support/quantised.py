"""Small quantised folders, made of a plain one: every value is known by construction, from codes and scales drawn here.

Each maker takes a matrix and gives the parts that replace it and what they are worth: the codes are known, so that no
unpacking is needed to say it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import oracle
from oracle.bases import edit_config, read_tensors, write_tensors

Parts = dict[str, torch.Tensor]
ATTENTION, MLP = r"self_attn\.[qkvo]_proj\.weight$", r"mlp\.(?:gate|up|down)_proj\.weight$"
LINEAR = f"{ATTENTION}|{MLP}"

NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def fp8_blocks(name: str, weight: torch.Tensor, size: tuple[int, int] = (32, 16)) -> tuple[Parts, torch.Tensor]:
    rows, columns = weight.shape
    grid = -(-rows // size[0]), -(-columns // size[1])
    at = torch.arange(rows) // size[0], torch.arange(columns) // size[1]
    scale = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            scale[i, j] = weight[at[0] == i][:, at[1] == j].abs().max().float() / 448
    spread = scale[at[0]][:, at[1]]
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, (codes.float() * spread).to(weight.dtype)


def nf4(name: str, weight: torch.Tensor, *, nested: bool = False) -> tuple[Parts, torch.Tensor]:
    block, count = 64, weight.numel()
    flat = torch.cat([weight.float().flatten(), torch.zeros(-count % block)]).view(-1, block)
    absmax = flat.abs().amax(1)
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": block, "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }  # fmt: skip
    parts: Parts = {}
    if nested:
        table = torch.linspace(-1, 1, 256)
        offset, small = float(absmax.mean()), torch.full((-(-absmax.numel() // 256),), 0.5)
        codes = ((absmax - offset)[:, None] / 0.5 - table).abs().argmin(1)
        absmax = table[codes] * 0.5 + torch.tensor(offset)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts = {f"{name}.nested_absmax": small, f"{name}.nested_quant_map": table}
        parts[f"{name}.absmax"] = codes.to(torch.uint8)
    else:
        parts[f"{name}.absmax"] = absmax
    nearest = (flat / absmax[:, None])[..., None].sub(NF4).abs().argmin(-1)
    whole = (NF4[nearest] * absmax[:, None]).flatten()[:count].view(weight.shape).to(weight.dtype)
    halves = torch.cat([nearest.flatten()[:count], torch.zeros(count % 2, dtype=torch.long)]).view(-1, 2)
    parts[name] = (halves[:, 0] * 16 + halves[:, 1]).to(torch.uint8).view(-1, 1)
    parts[f"{name}.quant_map"] = NF4.clone()
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {**parts, f"{name}.quant_state.bitsandbytes__nf4": raw}, whole


def nf4_nested(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    return nf4(name, weight, nested=True)


def int8(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scale = weight.float().abs().amax(1)
    codes = (weight.float() / scale[:, None] * 127).round().to(torch.int8)
    whole = (codes.float() * scale[:, None] * 7.874015718698502e-3).to(weight.dtype)
    module = name.removesuffix(".weight")
    parts = {name: codes, f"{module}.SCB": scale, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, whole


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes packed along the last dimension into words of 32 bits."""
    count = 32 // bits
    held = codes.reshape(*codes.shape[:-1], -1, count).to(torch.int64)
    packed = torch.zeros(held.shape[:-1], dtype=torch.int64)
    for at, column in enumerate(order or range(count)):
        packed |= held[..., column] << (bits * at)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _grouped(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of four bits `[in, out]`, zero points and scales `[groups, out]`; no zero point is 0."""
    held = weight.float().T.reshape(-1, size, weight.shape[0])
    low, high = held.amin(1), held.amax(1)
    scales = ((high - low) / 15).to(torch.float16)
    zeros = (-low / scales.float()).round().clamp(1, 15).long()
    codes = (held / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15).long()
    return codes.view(-1, weight.shape[0]), zeros, scales


def _columns(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, size: int, dtype: Any) -> torch.Tensor:
    spread = zeros.repeat_interleave(size, 0), scales.repeat_interleave(size, 0)
    return ((codes - spread[0]).float() * spread[1].float()).to(dtype).T.contiguous()


def gptq(name: str, weight: torch.Tensor, size: int = 16) -> tuple[Parts, torch.Tensor]:
    codes, zeros, scales = _grouped(weight, size)
    module = name.removesuffix(".weight")
    parts = {
        f"{module}.qweight": words(codes.T, 4).T.contiguous(), f"{module}.qzeros": words(zeros - 1, 4),
        f"{module}.scales": scales, f"{module}.g_idx": (torch.arange(weight.shape[1]) // size).to(torch.int32),
    }  # fmt: skip
    return parts, _columns(codes, zeros, scales, size, weight.dtype)


def awq(name: str, weight: torch.Tensor, size: int = 16) -> tuple[Parts, torch.Tensor]:
    codes, zeros, scales = _grouped(weight, size)
    module, order = name.removesuffix(".weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        f"{module}.qweight": words(codes, 4, order), f"{module}.qzeros": words(zeros, 4, order),
        f"{module}.scales": scales,
    }  # fmt: skip
    # AutoAWQ multiplies in fp16.
    return parts, _columns(codes, zeros, scales, size, torch.float16).to(weight.dtype)


def packed(name: str, weight: torch.Tensor, size: int = 16) -> tuple[Parts, torch.Tensor]:
    held = weight.float().view(weight.shape[0], -1, size)
    scales = (held.abs().amax(-1) / 7).to(weight.dtype)
    codes = (held / scales.float()[..., None]).round().clamp(-8, 7).long()
    module = name.removesuffix(".weight")
    parts = {
        f"{module}.weight_packed": words((codes + 8).view(weight.shape), 4), f"{module}.weight_scale": scales,
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    return parts, (codes.float() * scales.float()[..., None]).view(weight.shape).to(weight.dtype)


def fp8_channel(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    module = name.removesuffix(".weight")
    whole = (codes.float() * scale.float()).to(torch.bfloat16).to(weight.dtype)
    return {name: codes, f"{module}.weight_scale": scale}, whole


def _e2m1(held: torch.Tensor) -> torch.Tensor:
    """The nearest code of each value."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return (held.abs()[..., None] - table).abs().argmin(-1) + 8 * held.signbit().long()


def _pairs(codes: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    flat = codes.view(shape[0], -1, 2)
    return (flat[..., 0] + 16 * flat[..., 1]).to(torch.uint8)


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def nvfp4(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    held = weight.float().view(weight.shape[0], -1, 16)
    whole = 448 * 6 / weight.float().abs().max().view(1)
    scales = (held.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    spread = (scales.float() / whole)[..., None]
    codes = _e2m1(held / spread)
    module = name.removesuffix(".weight")
    parts = {
        f"{module}.weight_packed": _pairs(codes, weight.shape), f"{module}.weight_scale": scales,
        f"{module}.weight_global_scale": whole, f"{module}.input_global_scale": torch.ones(1),
    }  # fmt: skip
    return parts, (E2M1[codes] * spread).view(weight.shape).to(torch.bfloat16).to(weight.dtype)


def mxfp4_rows(name: str, weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    held = weight.float().view(weight.shape[0], -1, 32)
    exponents = (held.abs().amax(-1) / 6).log2().ceil()
    codes = _e2m1(held / torch.exp2(exponents)[..., None])
    module = name.removesuffix(".weight")
    parts = {
        f"{module}.weight_packed": _pairs(codes, weight.shape),
        f"{module}.weight_scale": (exponents + 127).to(torch.uint8),
    }
    return parts, (E2M1[codes] * torch.exp2(exponents)[..., None]).view(weight.shape).to(weight.dtype)


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format: how a matrix becomes its parts, and what the config says."""

    make: Callable[[str, torch.Tensor], tuple[Parts, torch.Tensor]]
    config: dict[str, Any]


_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "fp8-blocks": Kind(fp8_blocks, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]}),
    "nf4": Kind(nf4, _BNB),
    "nf4-nested": Kind(nf4_nested, _BNB | {"bnb_4bit_use_double_quant": True}),
    "int8": Kind(int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": Kind(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}),
    "awq": Kind(awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}),
    "packed": Kind(packed, _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16)),
    "nvfp4": Kind(nvfp4, _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group")),
    "mxfp4-rows": Kind(mxfp4_rows, _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group")),
    "fp8-channel": Kind(fp8_channel, _compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """A quantised model, and the same with whole weights, worth the same."""

    path: Path
    whole: oracle.Base
    kind: Kind


def make(
    folder: Path, kind: str, *, modules: str = LINEAR, dtype: str = "bfloat16", sharded: bool = False, **settings: Any
) -> Folder:
    """A Llama whose matrices that `modules` names are quantised."""
    plain = oracle.make_base(folder / "plain", dtype=dtype, intermediate=96, hidden=64, **settings)
    own = KINDS[kind]
    tensors, parts = {}, {}
    for name, value in read_tensors(plain.path).items():
        if re.search(modules, name):
            parts[name], tensors[name] = own.make(name, value)
        else:
            parts[name], tensors[name] = {name: value}, value
    write_tensors(plain.path, tensors)
    path = folder / "quantised"
    shutil.copytree(plain.path, path)
    edit_config(path, quantization_config=own.config)
    flat = [(n, v) for held in parts.values() for n, v in held.items()]
    if sharded:
        # Every second tensor in another file: a scale often lies in another shard than its weight.
        (path / "model.safetensors").unlink()
        files = {f"model-0000{k + 1}-of-00002.safetensors": dict(flat[k::2]) for k in (0, 1)}
        for file, held in files.items():
            torch_save(held, path / file)
        index = {n: file for file, held in files.items() for n in held}
        content = {"metadata": {"total_size": sum(v.nbytes for _, v in flat)}, "weight_map": index}
        (path / "model.safetensors.index.json").write_text(json.dumps(content))
    else:
        write_tensors(path, dict(flat))
    return Folder(path, plain, own)


def torch_save(tensors: Parts, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: v.contiguous() for n, v in tensors.items()}, path, {"format": "pt"})


def change(folder: Path, edit: Callable[[Parts], Parts]) -> None:
    """Write a folder's tensors anew, changed."""
    write_tensors(folder, edit(read_tensors(folder)))
