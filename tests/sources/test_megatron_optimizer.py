"""Masters and moments of megatron-core's distributed optimizer against those that lived when it was saved.

`tests/runs/mcore/optimizer.py` trained a tiny Qwen3 with core 0.16.1 over two data-parallel ranks, and kept them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from converter.sources.megatron.source import SOURCE
from mcore.compare import RUNS, written
from oracle.command import run
from zero.compare import evaluated

TRAINED = RUNS.parent / "trained" / "fully-reshardable"
FOLDER = TRAINED / "iter_0000002"
_KEYS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
"""What megatron-core calls tensors of its local modules when it saves them."""


def _live(which: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in load_file(TRAINED / "live.safetensors").items():
        if name.startswith(f"{which}/"):
            key = name.partition("/")[2]
            for ours, theirs in _KEYS.items():
                key = key.replace(ours, theirs)
            found[key] = tensor
    return found


def _expect_equal(held: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[n], wanted[n]) and held[n].dtype is torch.float32 for n in wanted)


def test_masters_are_those_that_lived() -> None:
    _expect_equal(evaluated(SOURCE.open_masters(FOLDER, asked="x").tensors), _live("master"))


@pytest.mark.parametrize("which", ["exp_avg", "exp_avg_sq"])
def test_moments_are_those_that_lived(which: Literal["exp_avg", "exp_avg_sq"]) -> None:
    _expect_equal(evaluated(SOURCE.adam_moments(FOLDER, which=which)), _live(which))


def test_gather_writes_the_masters_and_not_the_rounded_weights(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("gather", TRAINED, out, "--master").code == 0
    made, wanted = written(out), _live("master")
    norm, embedding = wanted["decoder.final_layernorm.weight"], wanted["embedding.word_embeddings.weight"]
    assert torch.equal(made["model.norm.weight"], norm)
    assert not torch.equal(norm, norm.bfloat16().float())
    assert torch.equal(made["model.embed_tokens.weight"], embedding[: made["model.embed_tokens.weight"].shape[0]])
