"""`gather` on mixtures: what `mcore/models.py` puts into Megatron's modules, saved by torch, comes back bit by bit.

The folders that megatron-core itself writes are compared by tests/runs/run_mcore_matrix.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from mcore.compare import written
from mcore.models import built, in_megatron
from megatron_keys import experts_as_one
from oracle.command import run
from zero.compare import differences

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss")


def _saved(tmp_path: Path, case: str, **more: torch.Tensor) -> Path:
    """A run of one step, and beside it the model that it began with, which is the oracle."""
    model = built(case)
    model.save_pretrained(tmp_path / "base")
    state = experts_as_one(in_megatron(load_file(tmp_path / "base" / "model.safetensors"), model.config)) | more
    folder = tmp_path / "run" / "iter_0000001"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that one process saves alone
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder.parent


@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_comes_back_bit_by_bit(tmp_path: Path, case: str) -> None:
    folder, out = _saved(tmp_path, case), tmp_path / "out"
    done = run("gather", str(folder), str(out), "--base", str(tmp_path / "base"))
    assert done.code == 0, done.err
    assert differences(written(out), load_file(tmp_path / "base" / "model.safetensors")) == []


def test_layers_for_multi_token_prediction_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = _saved(tmp_path, "deepseek_v3", **{"mtp.layers.0.eh_proj.weight": torch.ones(16, 32)})
    out = tmp_path / "out"
    asked = ("gather", str(folder), str(out), "--base", str(tmp_path / "base"))
    done = run(*asked)
    assert done.code == 3
    assert "megatron-mtp" in done.err
    assert not out.exists()
    assert run(*asked, "--allow", "megatron-mtp").code == 0
    assert differences(written(out), load_file(tmp_path / "base" / "model.safetensors")) == []
    assert "mtp.layers.0.eh_proj.weight" in (out / "rlhf-convert.json").read_text()


@pytest.mark.parametrize(
    "key", ["self_attention.linear_qkv.adapter.linear_in.weight", "mlp.linear_fc1.lora_A.default.weight"]
)
def test_adapters_in_megatron_s_names_are_refused_by_name(tmp_path: Path, key: str) -> None:
    name = f"decoder.layers.0.{key}"
    folder = _saved(tmp_path, "qwen3", **{name: torch.ones(2, 16)})
    done = run("gather", str(folder), str(tmp_path / "out"), "--base", str(tmp_path / "base"))
    assert done.code == 3
    assert "megatron-lora" in done.err
    assert name in done.err
