"""A difference in shards of which a tensor is lost, misplaced or in a missing file is named, and never applied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from small_families import tiny

INDEX = "delta.safetensors.index.json"
FAMILIES = ("llama", "gpt2", "gpt_neox")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and the difference of another model of its family from it, in shards."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "tuned"):
        tiny(request.param).save_pretrained(folder / name)
    options = ["--max-shard-size", "5KB", "-q"]
    assert main(["make-delta", *(str(folder / n) for n in ("base", "tuned", "delta")), *options]) == 0
    return folder / "base", folder / "delta"


def codes(folder: Path) -> dict[str, tuple[str, str]]:
    return {f.code: (f.severity, f.text) for f in examine(DoctorRequest(str(folder))).findings}


def first_file(delta: Path) -> tuple[Path, str]:
    """A shard and a tensor of it."""
    value = json.loads((delta / INDEX).read_text())["weight_map"]
    name = min(value)
    return delta / value[name], name


def lost(delta: Path) -> str:
    file, name = first_file(delta)
    save_file({n: t for n, t in load_file(file).items() if n != name} or {"other": load_file(file)[name]}, file)
    return name


def misplaced(delta: Path) -> str:
    file, name = first_file(delta)
    value = json.loads((delta / INDEX).read_text())
    value["weight_map"][name] = next(f for f in value["weight_map"].values() if f != file.name)
    (delta / INDEX).write_text(json.dumps(value))
    return name


def without_its_file(delta: Path) -> str:
    file, _ = first_file(delta)
    file.unlink()
    return file.name


@pytest.mark.parametrize("harm", [lost, misplaced, without_its_file], ids=lambda f: f.__name__)
def test_a_harmed_difference_is_named_and_not_applied(harm: object, made: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = made
    assert codes(delta) == {}
    shutil.copytree(delta, tmp_path / "delta")
    assert callable(harm)
    name = harm(tmp_path / "delta")
    assert [s for s, text in codes(tmp_path / "delta").values() if name in text] == ["error"]
    assert main(["apply-delta", str(base), str(tmp_path / "delta"), str(tmp_path / "out"), "-q"]) == 3
    assert not (tmp_path / "out").exists()
