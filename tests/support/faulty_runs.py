"""Runs in which a system call fails, and what is on the disk afterwards."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from converter.core.writer.plan import Plan
from converter.core.writer.write import write
from converter.errors import ConvertError
from durability import Fault, Quiet, copy_inputs, fast_folder, merge_plan, tree
from power_cuts import Recorder, State


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge to be disturbed: its inputs lie in `folder`, its outputs go to folders beside them."""

    folder: Path
    plan: Plan
    other: Plan
    inputs: dict[str, dict[str, str]]
    checked: dict[str, str]
    unchecked: dict[str, str]  # the same, and a receipt that says so
    former: dict[str, str]

    def write(self, place: Path, **options: Any) -> None:
        write(self.plan, place / "out", reporter=Quiet(), jobs=1, **options)

    def expected(self, options: dict[str, Any]) -> dict[str, str]:
        return self.checked if options.get("verify", True) else self.unchecked

    def stop_before_publishing(self, place: Path, plan: Plan | None = None) -> None:
        """Leave `out.partial` with every shard written and journalled."""

        def interrupt(measures: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(plan or self.plan, place / "out", reporter=Quiet(), jobs=1, accept=interrupt, overwrite=True)

    def put_former(self, place: Path) -> None:
        shutil.copytree(self.folder / "former", place / "out")

    def inputs_are_untouched(self) -> bool:
        return {n: tree(self.folder / n) for n in ("base", "adapter")} == self.inputs


@pytest.fixture
def place(merge: Merge) -> Iterator[Path]:
    """An empty folder below the one that holds the inputs, so that one watch sees both."""
    folder = merge.folder / "place"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def fresh(merge: Merge, place: Path) -> dict[str, Any]:
    """Nothing is there. The other scenes leave the check after writing out: it reads much and changes nothing."""
    return {}


def resumed(merge: Merge, place: Path) -> dict[str, Any]:
    """An earlier run wrote all shards and the first line of another one."""
    merge.stop_before_publishing(place)
    with (place / "out.partial" / "journal.jsonl").open("a") as journal:
        journal.write('{"shard": "mod')
    (place / "out.partial" / "config.json").write_text("{")
    return {"verify": False}


def overwriting(merge: Merge, place: Path) -> dict[str, Any]:
    """Another output is there and is replaced; all shards are written."""
    merge.stop_before_publishing(place)
    merge.put_former(place)
    return {"overwrite": True, "verify": False}


def run_with_fault(merge: Merge, place: Path, fault: Fault, options: dict[str, Any]) -> ConvertError | None:
    with fault:
        try:
            merge.write(place, **options)
        except ConvertError as error:
            return error
    return None


def fail_at_intervals(merge: Merge, place: Path, number: int, *, step: int) -> int:
    """Every `step`-th call of a run fails, each in a run of its own, and the next run finishes; how many calls."""
    at = 0
    while True:
        fault = Fault(merge.folder, at=at, number=number)
        error = run_with_fault(merge, place, fault, {})
        if fault.happened is None:
            break
        assert error is not None or (place / "out").exists()
        if not (place / "out").exists():
            merge.write(place)
        assert tree(place / "out") == merge.checked, fault.happened
        (place / "out").rename(merge.folder / f"done-{number}-{at}")
        at += step
    assert merge.inputs_are_untouched()
    return at


def replay(merge: Merge, place: Path, scene: Scene, *, most: int) -> None:
    """Check OUT in every state that a power cut may leave, and run again from at most `most` of them."""
    options = scene(merge, place)
    expected = merge.expected(options)
    with Recorder(place) as recorder:
        merge.write(place, **options)
    states = list(recorder.states())
    assert states[0].keys == State(recorder, frozenset()).keys
    assert any(s.tree("out") == expected for s in states)
    for state in states:
        out = state.tree("out")
        assert out in (None, expected, merge.former if scene is overwriting else None)
        # What is replaced is never lost: it is OUT, or it is whole beside it until the new one is OUT.
        if scene is overwriting and out is None:
            assert state.tree("out.old") == merge.former
    for number, state in enumerate(various(states, most)):
        disk = merge.folder / f"disk-{number}"
        state.lay_out(disk)
        was_there = "out" in state.inodes
        merge.write(disk, **options | {"overwrite": was_there or scene is overwriting})
        assert tree(disk / "out") == expected
        assert os.listdir(disk) == ["out"]
        shutil.rmtree(disk)
    assert merge.inputs_are_untouched()


@pytest.fixture(scope="module")
def merge() -> Iterator[Merge]:
    with fast_folder() as folder:
        base, adapter = copy_inputs(folder)
        plan, other = merge_plan(base, adapter), merge_plan(base, adapter, max_shard_size=20_000)
        inputs = {n: tree(folder / n) for n in ("base", "adapter")}
        write(plan, folder / "whole", reporter=Quiet())
        write(other, folder / "former", reporter=Quiet())
        write(plan, folder / "unchecked", reporter=Quiet(), verify=False)
        trees = [tree(folder / name) for name in ("whole", "unchecked", "former")]
        yield Merge(folder, plan, other, inputs, *trees)


Scene = Callable[[Merge, Path], dict[str, Any]]


def various(states: list[State], most: int) -> list[State]:
    """At most `most` of the states, first one of each set of the names that recovery goes by, then a second of each."""
    kinds: dict[frozenset[str], list[State]] = {}
    for state in random.Random(1).sample(states, len(states)):
        telling = frozenset(p for p in state.keys if "/" not in p or p.endswith(("journal.jsonl", "rlhf-convert.json")))
        kinds.setdefault(telling, []).append(state)
    rounds = itertools.zip_longest(*kinds.values())
    return [state for each in rounds for state in each if state is not None][:most]
