"""NaN and infinity that an input brings along: counted by tensor on the way, on the screen and in the receipt."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from converter.core.compute.finite import ValuesSeen
from converter.core.tensors.dtypes import DType
from oracle.command import run
from small_models import open_model, plan_of, save_model, written

NAN, INF = float("nan"), float("inf")
FLOATS = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.float32: DType.F32,
    torch.float64: DType.F64,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.float8_e4m3fn: DType.F8_E4M3,
}


def bits(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_of_every_pattern_of_bits_those_are_counted_that_torch_calls_not_finite(dtype: torch.dtype) -> None:
    width = dtype.itemsize
    high = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    if width == 1:
        values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    else:  # the upper two bytes of each element in every pattern, those below nothing, one bit, and all
        cells = torch.zeros(3, 65536, width // 2, dtype=torch.uint16)
        cells[:, :, -1] = high
        cells[1, :, 0] |= 1
        cells[2, :, :-1] = 65535
        values = cells.view(torch.uint8).reshape(-1).view(dtype)
    expected = int((~torch.isfinite(values.to(torch.float64))).sum())
    found = ValuesSeen(FLOATS[dtype])
    found.add(bits(values))
    assert (found.count, expected > 0) == (expected, True)


@pytest.mark.parametrize("size", [1, 3, 5, 7, 4096])
def test_blocks_may_end_inside_an_element(size: int) -> None:
    values = torch.randn(300)
    values[[0, 7, 150, 299]] = torch.tensor([float("nan"), float("inf"), -float("inf"), -float("nan")])
    raw, found = bits(values), ValuesSeen(DType.F32)
    for start in range(0, len(raw), size):
        found.add(raw[start : start + size])
    assert found.count == 4


def test_integers_have_none() -> None:
    found = ValuesSeen(DType.I32)
    found.add(memoryview(b"\xff" * 64))
    assert found.count == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a NaN and two infinities in a projection, and one NaN in a norm."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    small = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=20)).bfloat16()
    with torch.no_grad():
        made.model.layers[0].mlp.up_proj.weight[[0, 7, 9], [1, 2, 3]] = torch.tensor([NAN, INF, -INF]).bfloat16()
        made.model.norm.weight[3] = -NAN
    made.save_pretrained(folder)
    torch.save({"model": made.state_dict(), "step": 3}, folder.parent / "checkpoint.pt")
    return folder


@pytest.mark.parametrize(
    "typed",
    [
        "reshard {model} {out}",
        "reshard {model} {out} --dtype float32",
        "reshard {model} {out} --dtype float16 --no-verify",
        "convert {model} {out} --to trl --role actor",
        "gather {model}/../checkpoint.pt {out} --base {model}",
    ],
)
def test_every_verb_names_the_tensors_and_the_counts(typed: str, model: Path, tmp_path: Path) -> None:
    done = run(*typed.format(model=model, out=tmp_path / "out").split())
    assert done.code == 0, done.err
    said = "4 non-finite values kept from the inputs: model.layers.0.mlp.up_proj.weight (3), model.norm.weight (1)"
    assert said in done.text
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    kept = {n: m["nonfinite_kept"] for n, m in receipt["tensors"].items() if m.get("nonfinite_kept")}
    assert kept == {"model.layers.0.mlp.up_proj.weight": 3, "model.norm.weight": 1}


def test_data_that_begins_at_an_odd_byte_is_read_all_the_same(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", {"y.weight": torch.ones(3, 100000)})
    values = load_file(folder / "model.safetensors")
    values["y.weight"][1, 7] = INF
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length] + b" "
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    receipt = written(plan_of(open_model(folder)), tmp_path / "out")
    assert receipt.measures == {"y.weight": {"nonfinite_kept": 1.0}}
