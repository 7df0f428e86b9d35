"""Reading from a Hub where every request fails once: the output is what it should be, or there is none."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from converter.shipped import shipped
from converter.sources.hub import mirror as hub_mirror
from fake_hub import FakeHub, Fault, running
from hub_here import client_of, on_disk, run

FIXTURES = shipped("fixtures")
RUN, BASE = "org/tiny-reward-run", "org/tiny-qwen2-base"
SOURCE = f"hf://{RUN}/checkpoint-4"
COMMANDS = {
    "gather": ["gather", RUN, "out"],
    "repair": ["repair", SOURCE, "out", "--base", BASE],
    "convert": ["convert", SOURCE, "out", "--base", BASE, "--to", "openrlhf", "--role", "reward"],
    "inspect": ["inspect", BASE],
    "doctor": ["doctor", SOURCE, "--base", BASE],
    "verify": ["verify", BASE, "--for", "trl", "--role", "actor"],
}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def whole(folder: Path) -> dict[str, bytes]:
    files = on_disk(folder)
    receipt = json.loads(files.pop("rlhf-convert.json"))
    assert receipt["verified"]
    return files


def fail_each(name: str, kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Run a command once for every request, which fails; how many requests there are, and how often it refused."""
    command, refused = COMMANDS[name], 0
    wanted: tuple[dict[str, bytes], str] | None = None
    for number in itertools.count(-1):
        here = home / f"{number}"
        (here / "home").mkdir(parents=True)
        monkeypatch.chdir(here)
        with running(FakeHub()) as hub, client_of(hub, here / "home"):
            hub.add(RUN, tree(FIXTURES / "tiny-reward-run"))
            hub.add(BASE, tree(FIXTURES / "tiny-qwen2-base"))
            if number >= 0:
                hub.faults = [Fault(".", kind, 1, skip=number)]
            ran = run(*command)
            if number >= 0 and hub.faults[0].count:
                return number, refused
            if ran.returncode == 3 and wanted is not None:
                refused += 1
                assert not Path("out").exists()
                hub.faults.clear()
                hub_mirror.forget()
                ran = run(*command)
            written = whole(Path("out")) if Path("out").exists() else {}
            said = "" if written else "\n".join(x for x in ran.stdout.splitlines() if not x.startswith("read "))
            if wanted is None:
                assert ran.returncode in (0, 1), ran.stderr
                wanted = written, said
            assert (written, said) == wanted, (number, ran.stderr)
        shutil.rmtree(here / "home", ignore_errors=True)
    raise AssertionError("unreachable")


@pytest.mark.parametrize(("name", "kind"), [("inspect", "corrupt")])
def test_a_command_says_the_same_whichever_request_fails(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, refused = fail_each(name, kind, tmp_path, monkeypatch)
    assert requests > 5
    assert refused <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "503", "429", "short", "lost", "corrupt", "403", "404", "whole", "moved"])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_made_is_the_same_whichever_request_fails(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, refused = fail_each(name, kind, tmp_path, monkeypatch)
    assert requests > 5
    if kind in ("drop", "503", "429", "short", "lost"):
        assert refused == 0
