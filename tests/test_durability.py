"""OUT is absent or whole, the inputs stay as they were, and the same call again finishes with the same bytes: whatever
operating-system call fails, and whatever a power cut leaves on the disk."""

from __future__ import annotations

import dataclasses
import errno
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
from converter.errors import ConvertError, Interrupted, Refused
from durability import Fault, Quiet, copy_inputs, fast_folder, merge_plan, tree
from power_cuts import Recorder, State

SIBLINGS = ("out.partial", "out.old", "out.replacing")


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


def begun_anew(merge: Merge, place: Path) -> dict[str, Any]:
    """An earlier run of another plan was stopped; its work is thrown away."""
    merge.stop_before_publishing(place, merge.other)
    return {"resume": False, "verify": False}


def overwriting(merge: Merge, place: Path) -> dict[str, Any]:
    """Another output is there and is replaced; all shards are written."""
    merge.stop_before_publishing(place)
    merge.put_former(place)
    return {"overwrite": True, "verify": False}


Scene = Callable[[Merge, Path], dict[str, Any]]


# A call fails


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("scene", [fresh, resumed, begun_anew, overwriting])
def test_whatever_call_fails_out_is_absent_or_whole_and_the_next_run_finishes(
    merge: Merge, place: Path, scene: Scene, number: int
) -> None:
    options = scene(merge, place)
    expected = merge.expected(options)
    before = place.rename(place.with_name("before"))
    at = 0
    try:
        while True:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(before, place)
            error = run_with_fault(merge, place, fault := Fault(merge.folder, at=at, number=number), options)
            if fault.happened is None:
                break
            context = f"{fault.happened} failed: {error}"
            left = tree(place / "out") if (place / "out").exists() else None
            allowed = [expected, merge.former] if scene is overwriting else [expected, None]
            assert left in allowed, context
            assert error is not None or left == expected, context
            assert error is None or error.exit_code == 3, context
            merge.write(place, **options | {"overwrite": left is not None})
            assert tree(place / "out") == expected, context
            assert os.listdir(place) == ["out"], context
            at += 1
        assert error is None
        assert tree(place / "out") == expected
        assert at > 30, "the watch saw nothing"
        assert merge.inputs_are_untouched()
    finally:
        shutil.rmtree(before)


def run_with_fault(merge: Merge, place: Path, fault: Fault, options: dict[str, Any]) -> ConvertError | None:
    with fault:
        try:
            merge.write(place, **options)
        except ConvertError as error:
            return error
    return None


def test_a_failure_before_the_first_shard_is_done_leaves_nothing_new(merge: Merge, place: Path) -> None:
    with (
        pytest.raises(Refused, match="the disk is full; nothing was published") as caught,
        Fault(merge.folder, at=12, number=errno.ENOSPC),
    ):
        write(merge.plan, place / "deep" / "er" / "out", reporter=Quiet())
    assert caught.value.code == "no-space"
    assert "free space" in str(caught.value.next)
    assert os.listdir(place) == []


def test_an_interrupt_after_publication_says_that_the_new_output_is_whole(merge: Merge, place: Path) -> None:
    merge.stop_before_publishing(place)
    merge.put_former(place)

    class Interrupting(Fault):
        def call(self, name: str, path: str, *more: Any) -> Any:
            if name == "unlink" and "/out.old/" in path:
                raise KeyboardInterrupt(15)
            return super().call(name, path, *more)

    with pytest.raises(Interrupted, match="the new one is whole") as caught, Interrupting(merge.folder, at=-1):
        merge.write(place, overwrite=True)
    assert caught.value.exit_code == 143
    assert tree(place / "out") == merge.checked
    merge.write(place, overwrite=True)
    assert os.listdir(place) == ["out"]


# The power fails


@pytest.mark.parametrize("scene", [fresh, resumed, begun_anew, overwriting])
def test_after_a_power_cut_at_any_point_out_is_absent_or_whole_and_the_next_run_finishes(
    merge: Merge, place: Path, scene: Scene
) -> None:
    replay(merge, place, scene, most=90)


def test_after_a_power_cut_while_a_stage_is_thrown_away_the_next_run_finishes(merge: Merge, place: Path) -> None:
    def refuse(measures: object) -> None:
        raise Refused("no-op", "nothing changed")

    with Recorder(place) as recorder, pytest.raises(Refused, match="nothing changed"):
        merge.write(place, verify=False, accept=refuse)
    assert os.listdir(place) == []
    for number, state in enumerate(various(list(recorder.states()), 120)):
        disk = merge.folder / f"disk-{number}"
        state.lay_out(disk)
        assert "out" not in state.inodes
        merge.write(disk, verify=False)
        assert tree(disk / "out") == merge.unchecked
        assert os.listdir(disk) == ["out"]
        shutil.rmtree(disk)


@pytest.mark.slow
@pytest.mark.parametrize("scene", [fresh, resumed, begun_anew, overwriting])
def test_after_a_power_cut_at_any_point_the_next_run_finishes_from_every_state(
    merge: Merge, place: Path, scene: Scene
) -> None:
    replay(merge, place, scene, most=100_000)


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


def various(states: list[State], most: int) -> list[State]:
    """At most `most` of the states, first one of each set of the names that recovery goes by, then a second of each."""
    kinds: dict[frozenset[str], list[State]] = {}
    for state in random.Random(1).sample(states, len(states)):
        telling = frozenset(p for p in state.keys if "/" not in p or p.endswith(("journal.jsonl", "rlhf-convert.json")))
        kinds.setdefault(telling, []).append(state)
    rounds = itertools.zip_longest(*kinds.values())
    return [state for each in rounds for state in each if state is not None][:most]
