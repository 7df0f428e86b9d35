"""`reshard` of runs and `--to dcp`, killed at any call: nothing half is published, and the same command finishes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator

import pytest

from durability import fast_folder, tree
from forked import Server
from places import REPOSITORY, TESTS
from selected import one_in

RUNS = TESTS / "runs"
COMMANDS = {
    "ZeRO-3 on other ranks": (RUNS / "zero" / "runs" / "lora-frozen-head-z3-n2", ("--world-size", "3")),
    "ZeRO-2 as ZeRO-3": (RUNS / "zero" / "runs" / "roundrobin-z2-n3", ("--stage", "3")),
    "verl on other ranks": (RUNS / "verl_saves" / "runs" / "actor-tied-fsdp1-n2", ("--world-size", "3")),
    "a distributed checkpoint": (REPOSITORY / "fixtures" / "tiny-qwen2-base", ("--to", "dcp")),
    "accelerate's sharded state as a full one": (RUNS / "dcp" / "runs" / "accelerate-n2", ("--to", "full")),
}
MORE = {
    "ZeRO-3 as a universal checkpoint": (RUNS / "zero" / "runs" / "lm-tied-z3-n2", ("--to", "universal")),
    "a universal checkpoint on ranks": (RUNS / "zero" / "universal_runs" / "lora-z3-n2", ("--world-size", "3")),
    "ZeRO-2 without ZeRO": (RUNS / "zero" / "runs" / "reward-z2-n2", ("--stage", "0")),
    "verl's replicas on other ranks": (RUNS / "verl_saves" / "runs" / "critic-hsdp-fsdp2-n4", ("--world-size", "2")),
    "accelerate's full state as a sharded one": (RUNS / "dcp" / "runs" / "accelerate-full-n2", ("--to", "sharded")),
    "accelerate's files of ranks on others": (RUNS / "dcp" / "runs" / "accelerate-ranks-n2", ("--world-size", "3")),
}
ALL = COMMANDS | MORE


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.mark.parametrize("name", one_in(2, COMMANDS))
def test_killed_at_a_few_random_calls_the_same_command_finishes(name: str, server: Server) -> None:
    killed(name, server, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_killed_at_sixty_random_calls_the_same_command_finishes(name: str, server: Server) -> None:
    killed(name, server, kills=60)


def killed(name: str, server: Server, *, kills: int) -> None:
    """Kill a command at random calls, sometimes the one that resumes too; each time it has to finish."""
    source, options = ALL[name]
    command = ("reshard", "in", "out", *options, "-q")
    rng = random.Random(name)
    with fast_folder() as folder:
        shutil.copytree(source, folder / "in")
        before = tree(folder / "in")
        whole = server.run(*command, folder=folder)
        assert whole.code == 0, whole.err
        assert len(whole.calls) > 30
        expected = tree(folder / "out")
        shutil.rmtree(folder / "out")
        for _ in range(kills):
            for _ in range(rng.choice((1, 2))):
                ended = server.run(*command, folder=folder, die_at=rng.randrange(len(whole.calls)))
                assert ended.code in (0, 9) or (folder / "out").exists(), ended.err
                assert not os.path.lexists(folder / "out") or tree(folder / "out") == expected
            if not (folder / "out").exists():
                finished = server.run(*command, folder=folder)
                assert finished.code == 0, finished.err
            assert tree(folder / "out") == expected
            assert tree(folder / "in") == before
            assert sorted(os.listdir(folder)) == ["in", "out"]
            shutil.rmtree(folder / "out")
