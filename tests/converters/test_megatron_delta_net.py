"""Qwen3-Next in Megatron: gated delta nets, gates between queries, norms of 1 + w; by the parts that checkpoints have.

`mcore/models.py` puts the model into megatron-core's modules, whose logits were compared with those of transformers;
the folders that megatron-core writes are compared by tests/runs/run_mcore_matrix.py.
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
from mcore.models import PARTS, built, in_megatron
from megatron_keys import experts_as_one
from oracle.command import run
from zero.compare import differences

_NAMES = ("query", "key", "value", "z", "beta", "alpha")
_NET = "decoder.layers.0.self_attention."


def _keys(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What megatron-core's `sharded_state_dict` calls them: experts as one, projections in parts."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in experts_as_one(held).items():
        if name.endswith(("in_proj.weight", "conv1d.weight")):
            parts = tensor.split(PARTS if "in_proj" in name else PARTS[:3])
            found |= {f"{name}.{part}": each for part, each in zip(_NAMES, parts, strict=False)}
        else:
            found[name] = tensor
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of transformers, which is the oracle."""
    folder = tmp_path_factory.mktemp("next") / "base"
    built("qwen3_next").save_pretrained(folder)
    return folder


def _saved(root: Path, base: Path, *, without: str = "", recorded: str = "true", **config: object) -> Path:
    state = _keys(in_megatron(load_file(base / "model.safetensors"), built("qwen3_next").config))
    folder = root / "run" / "iter_0000001"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that one process saves alone
        dcp.save({k: t for k, t in state.items() if k != without}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / "run_config.yaml").write_text(f"model:\n  layernorm_zero_centered_gamma: {recorded}\n")
    given = json.loads((base / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(given))
    return folder.parent


def test_a_gated_delta_net_comes_back_bit_by_bit(tmp_path: Path, base: Path) -> None:
    done = run("gather", _saved(tmp_path, base), tmp_path / "out")
    assert done.code == 0, done.err
    assert differences(written(tmp_path / "out"), load_file(base / "model.safetensors")) == []


def test_a_norm_of_a_gated_delta_net_is_one_more_than_megatron_s_rounded_once(tmp_path: Path, base: Path) -> None:
    folder = _saved(tmp_path, base)
    norm = torch.tensor([2.0**-9, 3 * 2.0**-9, -(2.0**-12), 0.3, -0.75, 1.5]).bfloat16()
    state = _keys(in_megatron(load_file(base / "model.safetensors"), built("qwen3_next").config))
    state = {k: t.bfloat16() for k, t in state.items()} | {_NET + "out_norm.weight": norm}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "iter_0000001", no_dist=True)
    assert run("gather", folder, tmp_path / "out").code == 0
    found = written(tmp_path / "out")["model.layers.0.linear_attn.norm.weight"]
    assert torch.equal(found, (norm.double() + 1).bfloat16())


@pytest.mark.parametrize("part", ["in_proj.weight.z", "conv1d.weight.key"])
def test_a_part_that_is_missing_is_refused_by_what_is_left_of_it(tmp_path: Path, base: Path, part: str) -> None:
    done = run("gather", _saved(tmp_path, base, without=_NET + part), tmp_path / "out")
    assert done.code == 3
    assert "megatron-keys" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("linear_num_value_heads", 2), ("linear_key_head_dim", 8), ("num_key_value_heads", 4)]
)
def test_a_config_with_other_heads_is_refused(tmp_path: Path, base: Path, field: str, value: int) -> None:
    done = run("gather", _saved(tmp_path, base, **{field: value}), tmp_path / "out")
    assert done.code == 3
    assert "megatron-config" in done.err


def test_a_run_without_norms_of_one_more_is_refused(tmp_path: Path, base: Path) -> None:
    done = run("gather", _saved(tmp_path, base, recorded="false"), tmp_path / "out")
    assert done.code == 3
    assert "megatron-norms" in done.err


def test_it_is_not_written_for_megatron(tmp_path: Path, base: Path) -> None:
    done = run("convert", base, tmp_path / "out", "--to", "megatron", "--role", "actor")
    assert done.code == 3
    assert "megatron-family" in done.err
    assert "which is rounded" in done.err
