"""A head of zeros is what a new file has where nothing is written: no arithmetic, so torch is not imported for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converter.core.files.checksums import crc32
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Filled
from small_models import numbers, open_model, plan_of, save_model, written

ALONE = """
import sys
from converter.cli import main
code = main(["rm-to-critic", sys.argv[1], sys.argv[2], "--to", "openrlhf", "--init-head", "zeros", "-q"])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize(("value", "how"), [(0.0, "filled"), (-0.0, "filled"), (1.0, "filled")])
def test_every_bit_of_a_filled_tensor_is_that_of_its_value(tmp_path: Path, value: float, how: str) -> None:
    checkpoint = open_model(save_model(tmp_path / "model", {"kept": numbers(3, 5)}))
    head = Filled(TensorInfo(DType.BF16, (2, 40)), value)
    plan = plan_of(checkpoint.replace(tensors={**checkpoint.tensors, "head": head}))
    assert plan.counts[how] == 1
    receipt = written(plan, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")["head"]
    expected = torch.full((2, 40), value, dtype=torch.bfloat16)
    assert torch.equal(made.view(torch.int16), expected.view(torch.int16))
    recorded = receipt.content["files"]["model.safetensors"]["tensors"]["head"]
    assert recorded == f"{crc32(bytes(expected.view(torch.uint8).numpy())):08x}"


def test_a_fresh_head_of_zeros_is_written_without_torch(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", ALONE, tmp_path / "model", tmp_path / "critic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "critic" / "model.safetensors")
    head = next(t for n, t in tensors.items() if t.shape == (1, 8))
    assert not head.view(torch.int16).any()
