"""Dequantised values are those of each vendor's own code, bit for bit: whole, and in any range of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from converter.converters.merge.quantised.whole import found_in, whole
from converter.core.checkpoint import Checkpoint
from converter.core.compute.evaluate import to_torch
from converter.core.context import Context
from converter.core.tensors import nodes
from converter.core.tensors.nodes import LazyTensor
from vendors import SETTINGS, of_case, quantised_model


def made_whole(checkpoint: Checkpoint) -> LazyTensor:
    return whole(checkpoint, found_in(checkpoint), Context()).after.tensors["m.weight"]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("case", SETTINGS)
def test_weights_are_what_the_vendor_makes_of_them(case: str, tmp_path: Path) -> None:
    parts, expected, config = of_case(case)
    lazy = made_whole(quantised_model(tmp_path / "model", parts, config))
    assert (lazy.info.shape, lazy.info.dtype.torch_name) == (tuple(expected.shape), config["dtype"])
    if "fp4" in case and not case.startswith("ct-"):
        # Code 8 is zero: bitsandbytes' table has 0.0, and its kernel for even widths gives -0.0.
        assert torch.equal(to_torch(lazy), expected)
        expected = expected + torch.zeros((), dtype=expected.dtype)
    assert same(to_torch(lazy), expected.contiguous())
    rows = expected.shape[0]
    for start, stop in ((0, 1), (1, rows), (rows - 1, rows), (rows // 3, rows // 3 + 2)):
        assert same(to_torch(nodes.rows(lazy, start, stop)), expected[start:stop].contiguous()), (start, stop)
    cut_twice = nodes.rows(nodes.rows(lazy, 1, rows - 1), 2, 5)
    assert same(to_torch(cut_twice), expected[3:6].contiguous())


def fp8_grids() -> Iterator[tuple[int, int, str]]:
    for rows, columns in ((256, 256), (128, 384), (64, 64), (576, 256), (192, 200), (1, 130)):
        for dtype in ("float32", "bfloat16"):
            yield rows, columns, dtype


@pytest.mark.parametrize(("rows", "columns", "scales"), list(fp8_grids()))
def test_fp8_blocks_are_those_of_transformers_and_right_where_it_refuses_them(
    rows: int, columns: int, scales: str, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).mul(100).to(torch.float8_e4m3fn)
    grid = (-(-rows // 128), -(-columns // 128))
    scale = torch.rand(grid, generator=generator).to(getattr(torch, scales))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dtype": "bfloat16"}
    lazy = made_whole(quantised_model(tmp_path / "m", {"m.weight": weight, "m.weight_scale_inv": scale}, config))
    block_of = torch.arange(rows) // 128, torch.arange(columns) // 128
    exact = weight.double() * scale.double()[block_of[0]][:, block_of[1]]
    expected = exact.float().to(torch.bfloat16)
    assert same(to_torch(lazy), expected)
    assert same(to_torch(nodes.rows(lazy, rows // 2, rows)), expected[rows // 2 :])
    if rows % 128 == 0 and columns % 128 == 0:
        assert same(expected, of_transformers(weight, scale))


def of_transformers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What `FineGrainedFP8Config(dequantize=True)` loads."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    found: torch.Tensor = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mxfp4_is_what_transformers_makes_of_every_byte(dtype: str, tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).repeat(3, 8).view(3, 4, 32, 16)
    scales = torch.tensor([100, 127, 130, 120], dtype=torch.uint8).repeat(3, 4, 8)
    config = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": dtype}
    parts = {"m.weight_blocks": blocks, "m.weight_scales": scales}
    lazy = made_whole(quantised_model(tmp_path / "m", parts, config))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype)).contiguous()
    assert same(to_torch(lazy), expected)
    assert same(to_torch(nodes.rows(lazy, 1, 3)), expected[1:])


@pytest.mark.parametrize("scale", [0, 1, 60, 126, 127, 128, 200, 252, 253, 254, 255])
def test_mxfp4_rounds_the_exact_value_once_under_any_scale(scale: int, tmp_path: Path) -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor([*values, *(-v for v in values)], dtype=torch.float64)
    blocks = torch.arange(16, dtype=torch.uint8).mul(17).view(1, 1, 1, 16)
    config = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "float32"}
    parts = {"m.weight_blocks": blocks, "m.weight_scales": torch.full((1, 1, 1), scale, dtype=torch.uint8)}
    lazy = made_whole(quantised_model(tmp_path / "m", parts, config))
    expected = (table * 2.0 ** (scale - 127)).float().repeat_interleave(2).view(1, 32, 1)
    assert same(to_torch(lazy), expected)


def test_a_nested_absmax_is_cut_at_blocks_of_its_own(tmp_path: Path) -> None:
    """1100 blocks of 64 lie in five of 256: rows in the middle begin in the third."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(1100 * 32 // 256 + 1)[: 1100 * 32].view(-1, 1)
    absmax = (torch.arange(1100) * 7 % 256).to(torch.uint8)
    nested, table = torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5]), torch.linspace(-1, 1, 256)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1100, 64], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.25,
    }  # fmt: skip
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts = {
        "m.weight": codes, "m.weight.absmax": absmax, "m.weight.quant_map": torch.linspace(-1, 1, 16),
        "m.weight.nested_absmax": nested, "m.weight.nested_quant_map": table,
        "m.weight.quant_state.bitsandbytes__nf4": raw,
    }  # fmt: skip
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "dtype": "float32"}
    lazy = made_whole(quantised_model(tmp_path / "m", parts, config))
    all_rows = to_torch(lazy)
    expected = table[absmax.long()] * nested[torch.arange(1100) // 256] + 0.25
    assert torch.equal(all_rows.abs().amax(1) > 0, expected != 0)
    assert torch.equal(
        all_rows[:, 1::8].abs().amax(1), (all_rows / expected[:, None]).abs()[:, 1::8].amax(1) * expected.abs()
    )
    for start, stop in ((0, 300), (511, 513), (600, 1100), (1099, 1100)):
        assert same(to_torch(nodes.rows(lazy, start, stop)), all_rows[start:stop])
