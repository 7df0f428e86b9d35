"""`--allow-name`: classes of a user's own trainer are data; none is imported, and no pattern allows an attack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from converter.core.formats.pickle_names import allowed_names, allowing_names
from converter.core.formats.torch_file import Opaque, read_torch_file
from converter.errors import Refused, UsageError
from oracle.command import run
from places import REPOSITORY
from zero.compare import RUNS, differences, live

TRAP = "open('imported', 'w').close()\nclass Progress: pass\n"


def _saved_with(path: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved while a trainer's module can be imported, which it can't be afterwards."""
    module = types.ModuleType("mytrainer")
    module.Progress = type("Progress", (), {"__module__": "mytrainer"})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mytrainer", module)
        progress = module.Progress()
        progress.seen, progress.weights = 7, torch.arange(4.0)
        torch.save(value | {"progress": progress}, path)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose trainer put an object of its own into the client state, and a trap where an import would find it."""
    folder = Path(shutil.copytree(RUNS / "reward-z2-n2", tmp_path / "run"))
    (path,) = (folder / "global_step2").glob("*model_states.pt")
    _saved_with(path, torch.load(path, weights_only=True), monkeypatch)  # noqa: TID251
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytrainer.py").write_text(TRAP)
    return folder


def test_an_unknown_name_is_refused_with_the_flag_that_allows_it(trained: Path) -> None:
    done = run("gather", "run", "out")
    assert (done.code, "pickle-names" in done.err, Path("out").exists()) == (3, True, False)
    assert r"--allow-name 'mytrainer\.Progress'" in done.err


def test_an_allowed_name_is_read_as_data_and_nothing_is_imported(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "converter", "gather", "run", "out", "--allow-name", r"mytrainer\.Progress"]
    places = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not Path("imported").exists()
    assert differences(load_file("out/model.safetensors"), live(RUNS / "reward-z2-n2")) == []
    assert "mytrainer.Progress" in json.loads(Path("out/rlhf-convert.json").read_text())["consents"]["pickle-names"]


def test_the_object_of_an_allowed_name_is_a_bag_of_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    _saved_with(path, {"w": torch.ones(2)}, monkeypatch)
    with allowing_names(["other", r"mytrainer\..*"]) as allowed:
        bag = read_torch_file(path).value["progress"]
    assert isinstance(bag, Opaque)
    assert (bag.path, bag.state["seen"], bag.state["weights"].info.shape) == ("mytrainer.Progress", 7, (4,))
    assert allowed.used == {"mytrainer.Progress"}
    assert allowed_names() is None
    with pytest.raises(Refused, match="mytrainer"):
        read_torch_file(path)


def test_every_verb_that_reads_pickles_has_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["X"]}')
    _saved_with(folder / "pytorch_model.bin", {}, monkeypatch)
    saved = run("inspect", "model", "--allow-name", r"mytrainer\.Progress")
    assert "pickle-names" not in saved.text
    assert "mytrainer" not in saved.text
    assert "mytrainer.Progress" in run("inspect", "model").text
    for verb in ("merge-lora", "gather", "reshard", "run", "inspect", "doctor"):
        assert "--allow-name REGEX" in run(verb, "--help").out, verb


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "(",
        ".*",
        "(?:os|mytrainer).*",
        r"(\w+)+x",
        r"(?:a|b){9}",
        "a*b*c*d",
        "a?" * 20 + "a" * 20,
        r"(?=a)b",
        r"(a)\1",
        "x" * 300,
        "a{99999999999}",
    ],
)  # fmt: skip
def test_a_pattern_that_is_none_or_allows_too_much_is_a_usage_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match="allow-name"), allowing_names([pattern]):
        pass
    done = run("gather", tmp_path, tmp_path / "out", "--allow-name", pattern)
    assert (done.code, "allow-name" in done.err) == (2, True)


class _Attack:
    def __reduce__(self) -> Any:
        return (os.system, ("touch hacked",))


def test_names_that_run_code_are_never_allowed_nor_is_the_flag_offered_for_them(trained: Path, tmp_path: Path) -> None:
    (path,) = (trained / "global_step2").glob("*model_states.pt")
    torch.save({"module": {"w": torch.ones(2)}, "x": _Attack()}, path)
    for more in ([], ["--allow-name", r"posix\.syste\w"], ["--allow-name", r"p\w*\.s\w*m"]):
        done = run("gather", "run", "out", *more)
        assert done.code in (2, 3)
        assert "posix.system" in done.err
        assert "--allow-name '" not in done.err
    assert not Path("hacked").exists()


def test_a_file_with_hundreds_of_names_is_refused_whatever_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("mytrainer")
    kinds = [type(f"C{i}", (), {"__module__": "mytrainer"}) for i in range(300)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mytrainer", module)
        for kind in kinds:
            setattr(module, kind.__name__, kind)
        torch.save({"x": [kind() for kind in kinds]}, tmp_path / "x.pt")
    with allowing_names([r"mytrainer\..*"]), pytest.raises(Refused, match="names code"):
        read_torch_file(tmp_path / "x.pt")
