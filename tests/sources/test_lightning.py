"""Lightning's one-file checkpoints: found from the run's root, gathered under the model's names, read as data alone."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.cli import main
from healthy.models import Saved
from oracle.bases import read_tensors

Tensors = dict[str, torch.Tensor]
PLACE = "lightning_logs/version_1/checkpoints"


def run(root: Path, attribute: str, kind: str = "llama", **more: Any) -> Tensors:
    """A run as Lightning 2.6 leaves it: two checkpoints, `last.ckpt`, and the model's config at its root."""
    Saved("causal", kind, more=(("tie_word_embeddings", False),)).write(root)
    tensors = read_tensors(root)
    (root / "model.safetensors").unlink()
    for version in ("lightning_logs/version_0/checkpoints", PLACE):
        (root / version).mkdir(parents=True)
    for step, name in ((4, "epoch=0-step=4.ckpt"), (8, "epoch=1-step=8.ckpt"), (8, "last.ckpt")):
        state = {f"{attribute}.{n}": t + step for n, t in tensors.items()}
        made = {
            "epoch": step // 4 - 1, "global_step": step, "pytorch-lightning_version": "2.6.6", "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint{...}": {"best_model_path": ""}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(8.0)}}, "param_groups": [{"params": [0]}]}],
            "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-3, "path": Path("x")}, **more,
        }  # fmt: skip
        torch.save(made, root / PLACE / name)
    return tensors


@pytest.mark.parametrize(("attribute", "kind"), [("model", "llama"), ("net", "qwen2"), ("llm.inner", "gpt_neox")])
def test_the_last_checkpoint_is_gathered_from_the_root(attribute: str, kind: str, tmp_path: Path) -> None:
    tensors = run(tmp_path / "run", attribute, kind)
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0
    made = read_tensors(tmp_path / "out")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[n], t + 8) for n, t in tensors.items())


@pytest.mark.parametrize("how", ["file", "tag"])
def test_another_one_is_named_by_its_file_or_by_tag(how: str, tmp_path: Path) -> None:
    tensors = run(tmp_path / "run", "model")
    file = tmp_path / "run" / PLACE / "epoch=0-step=4.ckpt"
    named = [str(file)] if how == "file" else [str(tmp_path / "run"), "--tag", file.stem]
    source, *rest = named
    assert main(["gather", source, str(tmp_path / "out"), "-q", *rest]) == 0
    made = read_tensors(tmp_path / "out")
    assert all(torch.equal(made[n], t + 4) for n, t in tensors.items())


def test_without_a_last_one_the_user_is_asked_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "model")
    (tmp_path / "run" / PLACE / "last.ckpt").unlink()
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "--tag epoch=1-step=8.ckpt" in capsys.readouterr().err


class _Runs:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("false",)


def test_hyper_parameters_of_a_user_s_class_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = types.ModuleType("theirs")
    theirs.Settings = type("Settings", (), {"__module__": "theirs"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    run(tmp_path / "run", "model", hyper_parameters={"settings": theirs.Settings()})
    monkeypatch.delitem(sys.modules, "theirs")
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out"), "-q"]) == 0


def test_what_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "model", hyper_parameters={"settings": _Runs()})
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    assert "pickle-names" in capsys.readouterr().err


def test_a_file_without_a_state_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "model", state_dict={})
    assert main(["gather", str(tmp_path / "run"), str(tmp_path / "out")]) == 3
    assert "lightning-malformed" in capsys.readouterr().err
