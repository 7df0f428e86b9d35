"""Quantise small weights with each vendor's own code and dequantise them with it: run in an environment that has them.

    python quantise_with_vendors.py OUT.safetensors

needs bitsandbytes 0.50.2, compressed-tensors 0.20.1, gptqmodel 7.7.0, autoawq 0.2.9 and torch (CPU). OUT holds the
tensors of each case as that vendor stores them, named `CASE/PART`, what the vendor makes of them as `CASE/whole`, and
the cases' settings as JSON in the file's metadata. `tests/runs/quantised/vendors.safetensors` is such a file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSORS: dict[str, torch.Tensor] = {}
SETTINGS: dict[str, dict[str, Any]] = {}


def drawing(case: str) -> torch.Generator:
    """Seeded by the case's name, so that a case is the same whichever stand beside it."""
    return torch.Generator().manual_seed(zlib.crc32(case.encode()))


def drawn(*shape: int, case: str) -> torch.Tensor:
    """Values with a few large ones, as weights have them."""
    generator = drawing(case)
    return torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()


def keep(case: str, parts: dict[str, torch.Tensor], whole: torch.Tensor, **settings: Any) -> None:
    for part, value in {**parts, "whole": whole}.items():
        TENSORS[f"{case}/{part}"] = value.detach().clone().contiguous()
    SETTINGS[case] = settings


def bitsandbytes() -> None:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit

    for table in ("nf4", "fp4"):
        for name, dtype in HALVES.items():
            for nested in (False, True):
                # Rows that are no whole number of blocks are odd in width: the CPU kernel is wrong for even ones.
                for shape in ((8, 128), (9, 15)):
                    case = f"bnb-{table}-{name}-{'nested' if nested else 'plain'}-{shape[0]}x{shape[1]}"
                    weight = drawn(*shape, case=case).to(dtype)
                    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=table)
                    parts = {"weight": codes}
                    parts |= {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
                    keep(case, parts, dequantize_4bit(codes, state), method="bitsandbytes", dtype=name)
    weight = drawn(8, 128, case="bnb-nf4-stored-as-bf16").to(torch.bfloat16)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", quant_storage=torch.bfloat16)
    parts = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    keep("bnb-nf4-stored-as-bf16", parts, dequantize_4bit(codes, state), method="bitsandbytes", dtype="bf16")
    for name, dtype in HALVES.items():
        codes, scale, _ = int8_vectorwise_quant(drawn(9, 24, case=f"bnb-int8-{name}").to(torch.float16))
        parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        keep(
            f"bnb-int8-{name}",
            parts,
            int8_vectorwise_dequant(codes, scale).to(dtype),
            method="bitsandbytes",
            dtype=name,
        )


def compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def quantise(case: str, form: str, scales: torch.dtype, shape: tuple[int, int], **weights: Any) -> None:
        args = QuantizationArgs(**weights)
        weight = drawn(*shape, case=f"ct-{case}").to(torch.bfloat16)
        rows, columns = shape
        if args.strategy == "tensor":
            grouped, grid = weight.reshape(1, -1), (1,)
        elif args.strategy == "channel":
            grouped, grid = weight, (rows, 1)
        elif args.strategy in ("group", "tensor_group"):
            grouped, grid = weight.reshape(-1, args.group_size), (rows, columns // args.group_size)
        else:
            high, wide = args.block_structure
            grid = (rows // high, columns // wide)
            grouped = weight.view(grid[0], high, grid[1], wide).transpose(1, 2).reshape(grid[0] * grid[1], -1)
        over = (
            {"global_scale": generate_gparam(weight.amin(), weight.amax())} if args.strategy == "tensor_group" else {}
        )
        scale, zero = calculate_qparams(grouped.amin(1), grouped.amax(1), args, **over)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": weight, "weight_scale": scale.to(scales).reshape(grid)}
        state |= {f"weight_{name}": value for name, value in over.items()}
        if not args.symmetric:
            state["weight_zero_point"] = zero.reshape(grid)
        compressor = BaseCompressor.get_value_from_registry(form)
        packed = dict(compressor.compress(dict(state), scheme))
        whole = compressor.decompress(dict(packed), scheme)["weight"]
        group = {"weights": args.model_dump(mode="json", exclude_none=True), "targets": ["Linear"]}
        config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        parts = {n: v for n, v in packed.items() if isinstance(v, torch.Tensor)}
        keep(f"ct-{case}", parts, whole, method="compressed-tensors", config=config)

    bf16, fp32 = torch.bfloat16, torch.float32
    fp8 = {"num_bits": 8, "type": "float"}
    for name, dtype in (("bf16", bf16), ("fp32", fp32)):
        quantise(f"fp8-channel-{name}", "float-quantized", dtype, (9, 24), strategy="channel", **fp8)
        quantise(f"fp8-tensor-{name}", "float-quantized", dtype, (9, 24), strategy="tensor", **fp8)
        quantise(
            f"fp8-block-{name}", "float-quantized", dtype, (32, 32), strategy="block", block_structure=[16, 16], **fp8
        )
    fp4 = {"num_bits": 4, "type": "float", "symmetric": True}
    for rows in (9, 16):
        form, more = "nvfp4-pack-quantized", {"scale_dtype": "torch.float8_e4m3fn", "group_size": 16}
        quantise(f"nvfp4-{rows}", form, fp32, (rows, 48), strategy="tensor_group", **fp4, **more)
        form, more = "mxfp4-pack-quantized", {"scale_dtype": "torch.uint8", "group_size": 32}
        quantise(f"mxfp4-{rows}", form, bf16, (rows, 96), strategy="group", **fp4, **more)
    for symmetric in (True, False):
        sign = "sym" if symmetric else "asym"
        own = {"type": "int", "symmetric": symmetric}
        quantise(f"int8-channel-{sign}", "int-quantized", bf16, (9, 24), num_bits=8, strategy="channel", **own)
        for bits in (4, 8):
            quantise(
                f"packed{bits}-group-{sign}",
                "pack-quantized",
                bf16,
                (11, 64),
                num_bits=bits,
                strategy="group",
                group_size=32,
                **own,
            )
            quantise(
                f"packed{bits}-channel-{sign}",
                "pack-quantized",
                fp32,
                (11, 21),
                num_bits=bits,
                strategy="channel",
                **own,
            )


def words(values: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes packed into words of 32 bits along `dim`, as both formats' documents say."""
    count = 32 // bits
    moved = values.movedim(dim, -1).reshape(*values.movedim(dim, -1).shape[:-1], -1, count).to(torch.int64)
    packed = sum(moved[..., column] << (bits * at) for at, column in enumerate(order or range(count)))
    signed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return signed.movedim(-1, dim).contiguous()


def _no(*_: Any, **__: Any) -> bool:
    return False


def _lacks(name: str) -> Any:
    raise AttributeError(name)


def bare(*packages: str, of: str) -> Any:
    """A module without what its packages import besides: kernels and model classes that play no part here."""
    found = importlib.util.find_spec(packages[0])
    assert found is not None and found.submodule_search_locations is not None
    top = Path(next(iter(found.submodule_search_locations)))
    for name in packages:
        sys.modules[name] = types.ModuleType(name)
        # What a package would define: questions about this Python and its devices, all answered no.
        sys.modules[name].__getattr__ = lambda asked: _no if not asked.startswith("__") else _lacks(asked)
        sys.modules[name].__path__ = [str(top.joinpath(*name.split(".")[1:]))]
    return importlib.import_module(of)


def gptq(folder: Path) -> None:
    convert_gptq_file = bare(
        "gptqmodel", "gptqmodel.utils", "gptqmodel.quantization", of="gptqmodel.utils.model_dequant"
    ).convert_gptq_file
    rows, columns = 16, 64
    for bits in (2, 4, 8):
        for form in ("gptq", "gptq_v2"):
            for order in (False, True):
                size = 16
                case = f"{form}-{bits}{'-act-order' if order else ''}"
                generator = drawing(case)
                codes = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
                zeros = torch.randint(1, 1 << bits, (columns // size, rows), generator=generator)
                scales = drawn(columns // size, rows, case=case).abs().to(torch.float16) / 8
                group = torch.arange(columns) // size
                group = group[torch.randperm(columns, generator=generator)] if order else group
                stored = zeros - 1 if form == "gptq" else zeros
                parts = {
                    "qweight": words(codes, bits, 0), "qzeros": words(stored, bits, 1), "scales": scales,
                    "g_idx": group.to(torch.int32),
                }  # fmt: skip
                config = {
                    "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order, "sym": False,
                    "checkpoint_format": form,
                }  # fmt: skip
                save_file({f"m.{k}": v for k, v in parts.items()}, folder / "gptq.safetensors")
                whole = convert_gptq_file(folder / "gptq.safetensors", torch.float16, config, "cpu")["m.weight"]
                keep(case, parts, whole, method="gptq", dtype="fp16", config=config)


def awq() -> None:
    package = bare("awq", "awq.utils", of="awq.utils.packing_utils")
    rows, columns, size = 40, 64, 16
    generator = drawing("awq")
    codes = torch.randint(0, 16, (columns, rows), generator=generator)
    zeros = torch.randint(0, 16, (columns // size, rows), generator=generator)
    order = tuple(package.AWQ_ORDER)
    parts = {
        "qweight": words(codes, 4, 1, order), "qzeros": words(zeros, 4, 1, order),
        "scales": (drawn(columns // size, rows, case="awq").abs() / 8).to(torch.float16),
    }  # fmt: skip
    whole = package.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, size)
    assert torch.equal(whole, (codes - zeros.repeat_interleave(size, 0)) * parts["scales"].repeat_interleave(size, 0))
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    keep("awq", parts, whole.T, method="awq", dtype="fp16", config=config)


def main() -> None:
    out = Path(sys.argv[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bitsandbytes()
        compressed_tensors()
        gptq(out.parent)
        awq()
    (out.parent / "gptq.safetensors").unlink()
    save_file(TENSORS, out, {"cases": json.dumps(SETTINGS, sort_keys=True)})
    print(f"{len(SETTINGS)} cases, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
