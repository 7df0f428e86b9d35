"""OUT is absent or whole, the inputs stay as they were, and the same call again finishes with the same bytes: whatever
operating-system call fails, and whatever a power cut leaves on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from converter.core.writer.write import write
from converter.errors import Interrupted, Refused
from durability import Call, Fault, Quiet, telling, tree
from faulty_runs import Merge, Scene, fresh, overwriting, replay, resumed, run_with_fault, various
from power_cuts import Recorder
from selected import each_value

SIBLINGS = ("out.partial", "out.old", "out.replacing")


def begun_anew(merge: Merge, place: Path) -> dict[str, Any]:
    """An earlier run of another plan was stopped; its work is thrown away."""
    merge.stop_before_publishing(place, merge.other)
    return {"resume": False, "verify": False}


# A call fails


SCENES = {scene.__name__: scene for scene in (fresh, resumed, begun_anew, overwriting)}
NUMBERS = {errno.errorcode[number]: number for number in (errno.EIO, errno.ENOSPC)}


@pytest.mark.parametrize(("scene", "number"), each_value(SCENES, NUMBERS))
def test_whatever_call_fails_out_is_absent_or_whole_and_the_next_run_finishes(
    merge: Merge, place: Path, scene: Scene, number: int
) -> None:
    """The first and the last call of each kind: what is done to which file."""
    fails(merge, place, scene, number, choose=telling)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_whichever_of_all_calls_fails_out_is_absent_or_whole_and_the_next_run_finishes(
    merge: Merge, place: Path, scene: Scene, number: int
) -> None:
    fails(merge, place, scene, number, choose=list)


def fails(
    merge: Merge, place: Path, scene: Scene, number: int, *, choose: Callable[[Sequence[Call]], list[Call]]
) -> None:
    """Let one call after another fail, of those that are chosen from all that a run makes."""
    options = scene(merge, place)
    expected = merge.expected(options)
    before = place.rename(place.with_name("before"))
    try:
        shutil.copytree(before, place)
        whole = Fault(merge.folder, at=-1, number=number)
        assert run_with_fault(merge, place, whole, options) is None
        assert tree(place / "out") == expected
        assert len(whole.calls) > 30, "the watch saw nothing"
        for call in choose(whole.calls):
            shutil.rmtree(place)
            shutil.copytree(before, place)
            error = run_with_fault(merge, place, fault := Fault(merge.folder, at=call, number=number), options)
            context = f"{fault.happened} failed: {error}"
            assert fault.happened is not None, call
            left = tree(place / "out") if (place / "out").exists() else None
            allowed = [expected, merge.former] if scene is overwriting else [expected, None]
            assert left in allowed, context
            assert error is not None or left == expected, context
            assert error is None or error.exit_code == 3, context
            merge.write(place, **options | {"overwrite": left is not None})
            assert tree(place / "out") == expected, context
            assert os.listdir(place) == ["out"], context
        assert merge.inputs_are_untouched()
    finally:
        shutil.rmtree(before)


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
    replay(merge, place, scene, most=24)


def test_after_a_power_cut_while_a_stage_is_thrown_away_the_next_run_finishes(merge: Merge, place: Path) -> None:
    def refuse(measures: object) -> None:
        raise Refused("no-op", "nothing changed")

    with Recorder(place) as recorder, pytest.raises(Refused, match="nothing changed"):
        merge.write(place, verify=False, accept=refuse)
    assert os.listdir(place) == []
    for number, state in enumerate(various(list(recorder.states()), 30)):
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
