"""`reshard` of runs and `--to dcp`, killed at any call: nothing half is published, and the same command finishes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from durability import fast_folder, tree
from forked import Server
from places import REPOSITORY, TESTS

RUNS = TESTS / "runs"
COMMANDS = {
    "ZeRO-3 on other ranks": (RUNS / "zero" / "runs" / "lora-frozen-head-z3-n2", ("--world-size", "3")),
    "ZeRO-2 as ZeRO-3": (RUNS / "zero" / "runs" / "roundrobin-z2-n3", ("--stage", "3")),
    "verl on other ranks": (RUNS / "verl_saves" / "runs" / "actor-tied-fsdp1-n2", ("--world-size", "3")),
    "a distributed checkpoint": (REPOSITORY / "fixtures" / "tiny-qwen2-base", ("--to", "dcp")),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_a_few_random_calls_the_same_command_finishes(name: str, server: Server) -> None:
    killed(name, server, kills=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_sixty_random_calls_the_same_command_finishes(name: str, server: Server) -> None:
    killed(name, server, kills=60)


def killed(name: str, server: Server, *, kills: int) -> None:
    """Kill a command at random calls, sometimes the one that resumes too; each time it has to finish."""
    source, options = COMMANDS[name]
    command = ("reshard", "in", "out", *options, "-q")
    rng = random.Random(name)
    with fast_folder() as folder:
        shutil.copytree(source, folder / "in")
        before = tree(folder / "in")
        assert server.run(*command, folder=folder).code == 0
        expected = tree(folder / "out")
        calls = _calls(server, command, folder)
        for _ in range(kills):
            for _ in range(rng.choice((1, 2))):
                ended = server.run(*command, folder=folder, die_at=rng.randrange(calls))
                assert ended.code in (0, 9) or (folder / "out").exists(), ended.err
                assert not os.path.lexists(folder / "out") or tree(folder / "out") == expected
            if not (folder / "out").exists():
                finished = server.run(*command, folder=folder)
                assert finished.code == 0, finished.err
            assert tree(folder / "out") == expected
            assert tree(folder / "in") == before
            assert sorted(os.listdir(folder)) == ["in", "out"]
            shutil.rmtree(folder / "out")


def _calls(server: Server, command: tuple[str, ...], folder: Path) -> int:
    """About how many watched calls a run makes: none is reached beyond them."""
    low, high = 1, 4096
    while high - low > 8:
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.rmtree(folder / "out.partial", ignore_errors=True)
        middle = (low + high) // 2
        low, high = (middle, high) if server.run(*command, folder=folder, die_at=middle).reached else (low, middle)
    for made in ("out", "out.partial"):
        shutil.rmtree(folder / made, ignore_errors=True)
    return high
