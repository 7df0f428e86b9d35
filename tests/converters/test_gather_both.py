"""`rlhf-convert gather --emit both` and `--part`: two outputs, each whole or absent, both planned before either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from oracle.command import listing, run
from zero.compare import RUNS


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA run with its config."""
    folder = Path(shutil.copytree(RUNS / "lora-z3-n2", tmp_path / "run"))
    (folder / "config-of-run.json").rename(folder / "config.json")
    monkeypatch.chdir(tmp_path)
    return folder


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_both_are_what_each_wish_alone_would_have_written(trained: Path, tmp_path: Path) -> None:
    done = run("gather", "run", "out", "--emit", "both")
    assert done.code == 0, done.err
    assert "wrote    out  LlamaForSequenceClassification" in done.out
    assert "wrote    out-adapter  LoRA r=2 alpha=8" in done.out
    assert "`latest` says so" in done.out
    assert run("gather", "run", "model", "--emit", "merged").code == 0
    assert run("gather", "run", "adapter", "--emit", "adapter").code == 0
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "model")
    assert _bytes(tmp_path / "out-adapter") == _bytes(tmp_path / "adapter")


def test_json_says_both(trained: Path) -> None:
    dry = run("gather", "run", "out", "--emit", "both", "--dry-run", "--json")
    value = json.loads(dry.out)
    assert (value["dry_run"], value["merged"]["out"], value["adapter"]["out"]) == (True, "out", "out-adapter")
    assert value["adapter"]["files"][0]["tensors"] == 9
    assert not Path("out").exists()
    value = json.loads(run("gather", "run", "out/", "--emit", "both", "--json").out)
    assert (value["out"], value["adapter"]["out"]) == ("out/", "out-adapter")
    for found, folder in ((value, "out"), (value["adapter"], "out-adapter")):
        assert found["receipt"] == json.loads(Path(folder, "rlhf-convert.json").read_text())


def test_a_run_that_ended_between_the_two_is_finished_by_the_same_command(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out-adapter.partial").mkdir()
    (tmp_path / "out-adapter.partial" / "thesis.txt").write_text("years of work")
    done = run("gather", "run", "out", "--emit", "both")
    assert (done.code, Path("out-adapter").exists()) == (3, False)
    assert "nothing written" not in done.err
    assert "out is whole" in done.err
    before = _stamps(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-adapter.partial")
    done = run("gather", "run", "out", "--emit", "both")
    assert done.code == 0, done.err
    assert "whole already" in done.out
    assert _stamps(tmp_path / "out") == before
    assert run("gather", "run", "adapter", "--emit", "adapter").code == 0
    assert _bytes(tmp_path / "out-adapter") == _bytes(tmp_path / "adapter")


@pytest.mark.parametrize("file", ["model.safetensors", "rlhf-convert.json"])
def test_a_model_that_is_not_what_would_be_written_is_not_taken_for_the_first_half(trained: Path, file: str) -> None:
    assert run("gather", "run", "out", "--emit", "merged").code == 0
    raw = bytearray(Path("out", file).read_bytes())
    raw[-9] ^= 1
    Path("out", file).write_bytes(raw)
    done = run("gather", "run", "out", "--emit", "both")
    assert (done.code, "output-exists" in done.err, Path("out-adapter").exists()) == (3, True, False)


def test_a_taken_place_of_either_stops_both(trained: Path, tmp_path: Path) -> None:
    Path("out-adapter").mkdir()
    before = listing(tmp_path)
    done = run("gather", "run", "out", "--emit", "both")
    assert (done.code, "out-adapter: the output exists already" in done.err) == (3, True)
    assert listing(tmp_path) == before
    shutil.rmtree("out-adapter")
    assert run("gather", "run", "out", "--emit", "both").code == 0
    assert run("gather", "run", "out", "--emit", "both").code == 3
    assert run("gather", "run", "out", "--emit", "both", "--overwrite").code == 0


def test_what_one_of_them_lacks_stops_both(trained: Path, tmp_path: Path) -> None:
    (trained / "config.json").unlink()
    before = listing(tmp_path)
    done = run("gather", "run", "out", "--emit", "both")
    assert (done.code, "config-missing" in done.err) == (3, True)
    assert listing(tmp_path) == before
    shutil.copytree(RUNS / "reward-z2-n2", tmp_path / "plain")
    done = run("gather", "plain", "out", "--emit", "both")
    assert (done.code, "no-adapter" in done.err, Path("out").exists()) == (3, True, False)


def test_both_over_a_base_that_the_run_does_not_hold(trained: Path, tmp_path: Path) -> None:
    assert run("gather", "run", "whole", "--emit", "merged").code == 0
    lean = Path(shutil.copytree(RUNS / "lora-lean-z2-n2", tmp_path / "lean"))
    base = Path(shutil.copytree(tmp_path / "whole", tmp_path / "base"))
    weights = {n: t for n, t in load_file(base / "model.safetensors").items() if n != "score.weight"}
    save_file(weights, base / "model.safetensors")
    (base / "rlhf-convert.json").unlink()
    done = run("gather", lean, "out", "--emit", "both", "--base", base)
    assert done.code == 0, done.err
    assert run("gather", lean, "model", "--emit", "merged", "--base", base).code == 0
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "model")
    assert json.loads(Path("out-adapter/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_two_recipes_are_not_printed_as_one(trained: Path) -> None:
    done = run("gather", "run", "out", "--emit", "both", "--print-recipe")
    assert (done.code, "two recipes" in done.err) == (2, True)


def test_a_part_of_a_state_that_has_none_is_a_usage_error(trained: Path) -> None:
    done = run("gather", "run", "out", "--part", "critic")
    assert (done.code, "no-parts" in done.err, Path("out").exists()) == (2, True, False)
    done = run("gather", "run", "out", "--part", "elephant")
    assert done.code == 2
    assert "'actor'" in done.err
