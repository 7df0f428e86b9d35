"""doctor names what makes a Megatron run unreadable though its files are whole: another config, a copied rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mcore.compare import RUNS
from oracle.command import run

NEW, OLD = RUNS / "qwen2-tied-tp2-pp2", RUNS / "old-qwen2-tp2-pp2"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 3, "the checkpoint's layers are 2, and config.json 3"),
        ("num_attention_heads", 2, "num_attention_heads is 4, and config.json 2"),
        ("vocab_size", 120, "it has 112 rows, and config.json a vocabulary of 120"),
    ],
)
def test_a_config_of_another_model_is_an_error(tmp_path: Path, field: str, value: int, said: str) -> None:
    folder = Path(shutil.copytree(NEW, tmp_path / "run"))
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "hf" / "config.json").write_text(json.dumps(config | {field: value}))
    done = run("doctor", folder)
    assert done.code == 1, done.out
    assert "megatron-config" in done.out
    assert said in done.text
    assert f"gather {folder} {folder}-gathered with --base and the folder" in done.text


def test_a_rank_s_file_that_is_a_copy_of_another_s_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD, tmp_path / "run"))
    ranks = folder / "iter_0000010"
    shutil.copy(ranks / "mp_rank_00_000" / "model_optim_rng.pt", ranks / "mp_rank_01_000" / "model_optim_rng.pt")
    for verb in (("doctor", folder), ("gather", folder, tmp_path / "out")):
        done = run(*verb)
        assert done.code in (1, 3), done.out
        assert "mp_rank_01_000 has the values of mp_rank_00_000" in done.text
    assert not (tmp_path / "out").exists()
