"""One output written by several processes: the bytes of one run, published once, whoever is killed or started twice."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from converter.core.writer.plan import Plan
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.tasks import Task, partition, write_task
from converter.core.writer.write import Receipt
from converter.errors import Refused
from durability import Death, Quiet, fast_folder, tree
from small_models import half_cast, written

BUSY = 3


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as made:
        yield made


def ran(plan: Plan, out: Path, number: int, count: int) -> Receipt | None:
    return write_task(plan, out, Task(number, count), reporter=Quiet())


def expect_one_run(plan: Plan, out: Path) -> None:
    """What is there is what one process makes, and nothing else."""
    written(plan, out.with_name("other"))
    assert tree(out) == tree(out.with_name("other"))
    assert sorted(os.listdir(out.parent)) == ["model", "other", "out"]


def started(run: Callable[[], object]) -> int:
    """A process that does it; it ends with 0, or with `BUSY` where another one holds the lock."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        run()
        code = 0
    except Refused as error:
        code = BUSY if error.code == "output-busy" else 71
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tasks_in_any_order_make_what_one_process_makes_and_the_last_has_the_receipt(folder: Path, count: int) -> None:
    plan = half_cast(folder)
    order = random.Random(count).sample(range(1, count + 1), count)
    receipts = [ran(plan, folder / "out", number, count) for number in order]
    assert [r is None for r in receipts] == [True] * (count - 1) + [False]
    expect_one_run(plan, folder / "out")


def test_until_the_last_task_has_written_its_files_nothing_has_the_outputs_name(folder: Path) -> None:
    plan = half_cast(folder)
    assert ran(plan, folder / "out", 1, 2) is None
    assert ran(plan, folder / "out", 1, 2) is None
    assert not (folder / "out").exists()


def test_a_task_that_is_started_again_after_the_end_changes_nothing(folder: Path) -> None:
    plan = half_cast(folder)
    assert ran(plan, folder / "out", 1, 2) is None
    assert ran(plan, folder / "out", 2, 2) is not None
    before = (folder / "out").stat().st_ino
    assert ran(plan, folder / "out", 1, 2) is None
    assert (folder / "out").stat().st_ino == before
    expect_one_run(plan, folder / "out")


def test_tasks_that_all_run_at_once_and_each_twice_publish_one_output(folder: Path) -> None:
    plan = half_cast(folder)
    pids = [started(lambda n=n: ran(plan, folder / "out", n, 3)) for n in (1, 2, 3) * 2]  # type: ignore[misc]
    assert {ended(pid) for pid in pids} <= {0, BUSY}
    if not (folder / "out").exists():  # the one that ended last found another copy of it at work
        ran(plan, folder / "out", 1, 3)
    expect_one_run(plan, folder / "out")


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_task_that_is_killed_anywhere_and_started_again_makes_what_one_process_makes(number: int) -> None:
    """The second of two ends the run: it is killed while it writes, while it moves files, checks and publishes."""
    deaths = 0
    for at in range(0, 120, 8):
        with fast_folder() as folder:
            plan, out = half_cast(folder), folder / "out"

            def killed(plan: Plan = plan, out: Path = out, at: int = at) -> None:
                with Death(out.parent, at=at):
                    ran(plan, out, number, 2)

            if number == 2:
                ran(plan, out, 1, 2)
            code = ended(started(killed))
            assert code in (0, 9)
            deaths += code == 9
            for again in (number, 3 - number, number):
                ran(plan, out, again, 2)
            expect_one_run(plan, out)
    assert deaths > 5


def test_an_output_of_other_values_is_not_taken_for_the_result(folder: Path) -> None:
    plan = half_cast(folder)
    written(plan, folder / "out")
    file = next((folder / "out").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-200:] = bytes(200)
    file.write_bytes(raw)
    with pytest.raises(Refused, match="exists already"):
        ran(plan, folder / "out", 1, 2)


def test_tasks_of_two_plans_are_told_so_and_nothing_is_published(folder: Path) -> None:
    plan = half_cast(folder)
    other = dataclasses.replace(plan, provenance={**plan.provenance, "recipe": "another"})
    assert ran(plan, folder / "out", 1, 2) is None
    with pytest.raises(Refused, match="differs in: recipe"):
        ran(other, folder / "out", 2, 2)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([1, 3, 5, 4, 3], 2, [[5, 3], [4, 3, 1]]),
        ([2, 2, 2], 1, [[2, 2, 2]]),
        ([7], 3, [[7], [], []]),
    ],
)
def test_the_largest_files_are_dealt_first_each_to_who_has_least(
    sizes: list[int], count: int, shares: list[list[int]]
) -> None:
    shards = [ShardPlan(f"{i}.safetensors", b"", (), b"", size) for i, size in enumerate(sizes)]
    assert [[s.size for s in share] for share in partition(shards, count)] == shares
