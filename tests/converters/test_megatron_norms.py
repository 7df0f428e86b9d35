"""Gemma in Megatron: norms that multiply by 1 + w, where the run records that Megatron's did so too; else refused.

Names are those of Megatron-Bridge's published mapping, read and not run: no such model is without TransformerEngine.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from mcore.compare import written
from mcore.models import GEMMA, built, in_megatron
from oracle.command import run
from zero.compare import differences


def _saved(tmp_path: Path, case: str, recorded: str = "") -> Path:
    model = built(case)
    model.save_pretrained(tmp_path / "base")
    folder = tmp_path / "run" / "iter_0000001"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that one process saves alone
        held = load_file(tmp_path / "base" / "model.safetensors")
        dcp.save(in_megatron(held, model.config), checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    if recorded:
        text = f"model:\n  layernorm_zero_centered_gamma: {recorded}\n  num_layers: 2\n"
        (folder / "run_config.yaml").write_text(text)
    return folder.parent


@pytest.mark.parametrize("case", GEMMA)
def test_a_gemma_whose_run_had_zero_centred_norms_comes_back_bit_by_bit_and_goes_again(
    tmp_path: Path, case: str
) -> None:
    folder, out, again = _saved(tmp_path, case, "true"), tmp_path / "out", tmp_path / "again"
    done = run("gather", folder, out, "--base", tmp_path / "base")
    assert done.code == 0, done.err
    wanted = load_file(tmp_path / "base" / "model.safetensors")
    assert differences(written(out), wanted) == []
    assert run("convert", out, again, "--to", "megatron", "--role", "actor").code == 0
    back = run("gather", again, tmp_path / "back", "--allow", "megatron-norms")
    assert back.code == 0, back.err
    assert differences(written(tmp_path / "back"), wanted) == []


@pytest.mark.parametrize(("recorded", "allowed"), [("", True), ("false", False)])
def test_norms_that_are_not_known_to_be_so_are_refused(tmp_path: Path, recorded: str, allowed: bool) -> None:
    asked = ("gather", _saved(tmp_path, "gemma2", recorded), tmp_path / "out", "--base", tmp_path / "base")
    done = run(*asked)
    assert done.code == 3
    assert "megatron-norms" in done.err
    assert not (tmp_path / "out").exists()
    assert (run(*asked, "--allow", "megatron-norms").code == 0) is allowed


def test_other_families_with_zero_centred_norms_are_refused(tmp_path: Path) -> None:
    done = run("gather", _saved(tmp_path, "llama", "true"), tmp_path / "out", "--base", tmp_path / "base")
    assert done.code == 3
    assert "apply_layernorm_1p" in done.err
