"""One plan written by several processes, on one machine or on many that share the output's file system.

Each task writes its share of the files into a stage of its own, `OUT.task-2-of-8.partial/`, with that stage's lock and
journal. Once the journals list every file, a task moves them all into `OUT.partial/` and ends the run as one process
would: checks, side files, receipt, rename. Its lock lets one task do so; the others wait until the output is there, and
take over where the one that held it died. So it is published once, whichever task is last, killed, or started twice.

Locks are `flock`, which a network file system must share among its clients (NFS 4 and Lustre with `flock` do).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, as_completed, wait
from pathlib import Path
from typing import Any

from converter.core.files.names import RECEIPT
from converter.core.files.reading import InputFiles
from converter.core.writer.plan import Plan
from converter.core.writer.preflight import check_space, check_target, memory_limit
from converter.core.writer.proof import check_written
from converter.core.writer.reporter import Reporter, Silent
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.shard_writer import ShardWriter
from converter.core.writer.stage import Stage, fsync_folder, make_folders
from converter.core.writer.write import (
    Accept,
    Receipt,
    is_worth_keeping,
    one_thread_each,
    reading_through,
    system_refused,
    write,
    write_shards,
)
from converter.errors import ConvertError, Refused

WAIT_SECONDS = 0.2
"""Between two looks at whether another task has ended the run."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Which of how many: `number` counts from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        """As it is typed: `2/8`."""
        return f"{self.number}/{self.count}"


def partition(shards: Sequence[ShardPlan], count: int) -> list[list[ShardPlan]]:
    """The files of each task: the largest first, each to the task that has the fewest bytes so far."""
    shares: list[list[ShardPlan]] = [[] for _ in range(count)]
    sizes = [0] * count
    for shard in sorted(shards, key=lambda s: (-s.size, s.file)):
        least = sizes.index(min(sizes))
        shares[least].append(shard)
        sizes[least] += shard.size
    return shares


def write_task(
    plan: Plan,
    out: Path,
    task: Task,
    *,
    reporter: Reporter,
    jobs: int = 1,
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = True,
    accept: Accept | None = None,
) -> Receipt | None:
    """Write one task's files, and end the run where they were the last; arguments as of `write`.

    Returns:
        The receipt of the run that this task ended; None where other tasks still write, or one of them ended it.

    Raises:
        Refused, VerificationFailed: as of `write`; and another process does the same task (`output-busy`), or a task
            has another plan (`stage-differs`).
    """
    run = _Run(plan, out, task.count)
    budget = memory_limit(plan, memory)
    try:
        if not run.is_published() and not run.is_written():
            check_target(out, plan.inputs, overwrite=overwrite)
            run.write_share(task, reporter, jobs, budget, resume=resume)
    except Refused as error:
        if error.code != "output-exists" or not run.is_published():
            raise
    while not run.is_published():
        if not run.is_written():
            if resume:
                run.expect_one_plan()
            return None
        try:
            receipt = write(
                plan, out, reporter=reporter, jobs=jobs, memory=memory, overwrite=overwrite, verify=verify,
                accept=accept, take=run.take, already=run.allocated(),
            )  # fmt: skip
        except Refused as error:
            if error.code not in ("output-busy", "output-exists") or (out.exists() and not run.is_published()):
                raise
            time.sleep(WAIT_SECONDS)
        else:
            run.clear()
            return receipt
    run.clear()
    return None


def write_with(
    executor: Executor,
    plan: Plan,
    out: Path,
    *,
    reporter: Reporter,
    jobs: int = 1,
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = True,
    accept: Accept | None = None,
) -> Receipt:
    """Write each file of a plan as a task of its own in an executor's workers, and end the run here.

    Args:
        executor: whose workers see the inputs and the output under the same paths as this process.
        jobs: threads, of each worker.
        memory: bytes that each worker may hold.

    Raises:
        Refused, VerificationFailed: as of `write`, whichever process found it.
    """
    run = _Run(plan, out, max(len(plan.written), 1))
    memory_limit(plan, memory)
    check_target(out, plan.inputs, overwrite=overwrite)
    check_space(plan, out, already=run.allocated() + Stage(out).allocated())
    with one_thread_each(plan) as ready:
        ready()  # workers may be threads of this process: none shall set for itself how many threads torch has
        futures = [
            executor.submit(write_share, plan, out, Task(n + 1, run.count), jobs=jobs, memory=memory, resume=resume)
            for n in range(run.count)
        ]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        receipt = write(
            plan, out, reporter=reporter, jobs=jobs, memory=memory, overwrite=overwrite, verify=verify, accept=accept,
            take=run.take, already=run.allocated(),
        )  # fmt: skip
    run.clear()
    return receipt


def write_share(plan: Plan, out: Path, task: Task, *, jobs: int, memory: int | None, resume: bool) -> None:
    """What a worker of an executor does: one task's files into their stage."""
    _Run(plan, out, task.count).write_share(task, Silent(), jobs, memory_limit(plan, memory), resume=resume)


class _Run:
    """What all tasks of one plan and output share: it lies on the disk, and nowhere else."""

    def __init__(self, plan: Plan, out: Path, count: int) -> None:
        self._plan, self._out, self.count = plan, out, count
        self._shares = partition(plan.written, count)
        names = [f"{out.name}.task-{n}-of-{count}" for n in range(1, count + 1)]
        self._stages = [out.with_name(name) for name in names]

    def is_published(self) -> bool:
        """True where the output is there, made by the same recipe, and its bytes are those of this plan."""
        try:
            receipt = json.loads((self._out / RECEIPT).read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        expected = json.loads(json.dumps({**self._plan.provenance, "counts": self._plan.counts}))
        if not isinstance(receipt, dict) or any(receipt.get(key) != value for key, value in expected.items()):
            return False
        try:
            with InputFiles(self._plan.inputs) as files:
                check_written(self._plan, self._out, files)
        except (ConvertError, OSError):
            return False
        return True

    def is_written(self) -> bool:
        """True where every task's journal is there and lists its files, which are there too."""
        lines = [Stage(s).lines_of(self._plan.summary) for s in self._stages]
        return all(
            found is not None and all(self._is_done(shard, found, stage) for shard in share)
            for found, share, stage in zip(lines, self._shares, self._stages, strict=True)
        )

    def expect_one_plan(self) -> None:
        """Refuse tasks that were given other inputs, or see them elsewhere: they would wait for one another for ever.

        Raises:
            Refused: names the first difference (`stage-differs`).
        """
        for each in self._stages:
            Stage(each).expect_plan(self._plan.summary)

    def _is_done(self, shard: ShardPlan, lines: Mapping[str, Any], stage: Path) -> bool:
        """True for a journalled file in the task's stage or in the shared one, in this order: it moves that way."""
        return shard.file in lines and any((Stage(s).folder / shard.file).is_file() for s in (stage, self._out))

    def write_share(self, task: Task, reporter: Reporter, jobs: int, budget: int, *, resume: bool) -> None:
        """Write what is missing of one task's files."""
        stage = Stage(self._stages[task.number - 1])
        done = (stage.lines_of(self._plan.summary) if resume else None) or {}
        shards = [s for s in self._shares[task.number - 1] if not self._is_moved(s, done, stage)]
        share = dataclasses.replace(self._plan, shards=tuple(shards), side_files={})
        try:
            check_space(share, stage.out, already=stage.allocated())
            stage.open()
            kept = stage.resume(self._plan.summary, self._plan.provenance, fresh=not resume)
            with InputFiles(self._plan.inputs) as files, one_thread_each(share) as ready, reading_through(share):
                writer = ShardWriter(stage, files, reporter, budget, ready)
                write_shards(share, stage, kept, reporter, writer, jobs)
                files.check_unchanged()
        except BaseException as error:
            if not is_worth_keeping(stage, error):
                with contextlib.suppress(OSError):
                    stage.discard()
            if isinstance(error, OSError):
                raise system_refused(error, stage) from error
            raise
        finally:
            stage.close()

    def _is_moved(self, shard: ShardPlan, lines: Mapping[str, Any], stage: Stage) -> bool:
        return self._is_done(shard, lines, stage.out) and not (stage.folder / shard.file).is_file()

    def take(self, stage: Stage, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Move every task's files into the shared stage; their journal lines by file, with those that it has."""
        found = dict(kept)
        for each, share in zip(self._stages, self._shares, strict=True):
            part = Stage(each)
            if not os.path.lexists(part.folder):
                continue
            part.open()
            try:
                lines = part.lines_of(self._plan.summary) or {}
                for shard in share:
                    place = part.folder / shard.file
                    if shard.file in lines and shard.file not in found and place.is_file():
                        target = stage.folder / shard.file
                        make_folders(target.parent)
                        os.rename(place, target)
                        fsync_folder(target.parent)
                        stage.record(lines[shard.file])
                        found[shard.file] = lines[shard.file]
            finally:
                part.close()
        return found

    def allocated(self) -> int:
        """Bytes of disk that the tasks' files hold."""
        return sum(Stage(each).allocated() for each in self._stages)

    def clear(self) -> None:
        """Remove the tasks' stages, but for one that a process still holds: it removes that itself."""
        for each in self._stages:
            part = Stage(each)
            if os.path.lexists(part.folder):
                try:
                    part.open()
                    part.resume(self._plan.summary, self._plan.provenance, fresh=True)
                    part.discard()
                except Refused:
                    continue
                finally:
                    part.close()
