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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed, wait
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from converter.core.files.names import RECEIPT
from converter.core.files.reading import InputFiles
from converter.core.tensors.byte_runs import reads
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


@dataclasses.dataclass(frozen=True)
class Share:
    """One task's files of a plan, as they are given to a worker.

    Attributes:
        plan: these files alone, and the inputs that are read for them.
        summary: of the whole plan.
        stage: the output's name of the task's own stage.
        jobs: threads of the worker.
        memory: bytes that the worker may hold; None: what its machine has free.
    """

    plan: Plan
    summary: Mapping[str, str]
    out: Path
    stage: Path
    jobs: int
    memory: int | None
    resume: bool


@dataclasses.dataclass
class Written:
    """What a worker did: file, bytes, and whether an earlier run wrote it."""

    files: list[tuple[str, int, bool]] = dataclasses.field(default_factory=list)


@runtime_checkable
class Telling(Protocol):
    """An executor whose workers tell how far they are while they write."""

    def listen(self, advance: Callable[[int, str], None]) -> None:
        """From now on `advance` is called with bytes that were written since, and a tensor's name."""


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
    memory_limit(plan, memory)
    try:
        if not run.is_published() and not run.is_written():
            check_target(out, plan.inputs, overwrite=overwrite)
            write_share(run.share(task, jobs, memory, resume=resume), reporter)
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
    reporter.start(plan.total_bytes, len(plan.written))
    is_telling = isinstance(executor, Telling)
    if isinstance(executor, Telling):
        executor.listen(reporter.advance)
    with one_thread_each(plan) as ready:
        ready()  # workers may be threads of this process: none shall set for itself how many threads torch has
        shares = [run.share(Task(n + 1, run.count), jobs, memory, resume=resume) for n in range(run.count)]
        futures: list[Future[Written]] = [executor.submit(write_share, share) for share in shares]
        try:
            for future in as_completed(futures):
                for file, size, resumed in future.result().files:
                    reporter.advance(0 if is_telling or resumed else size, "")
                    reporter.shard_done(file, size, resumed)
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
        receipt = write(
            plan, out, reporter=_Told(reporter), jobs=jobs, memory=memory, overwrite=overwrite, verify=verify,
            accept=accept, take=run.take, already=run.allocated(),
        )  # fmt: skip
    run.clear()
    return receipt


class _Told(Silent):
    """Hears the end of a run whose files were told of already."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def checking(self, what: str) -> None:
        """Passed on."""
        self._reporter.checking(what)


class _Noted:
    """Passes all on, and notes the files."""

    def __init__(self, reporter: Reporter) -> None:
        self.written = Written()
        self.start, self.advance, self.checking = reporter.start, reporter.advance, reporter.checking
        self._shard_done = reporter.shard_done

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """Noted."""
        self.written.files.append((file, size, resumed))
        self._shard_done(file, size, resumed)


def write_share(share: Share, reporter: Reporter | None = None) -> Written:
    """Write what is missing of one task's files into their stage: what a worker of an executor does.

    Raises:
        Refused: as of `write`; and another process does the same (`output-busy`).
    """
    stage, noted = Stage(share.stage), _Noted(reporter or Silent())
    done = (stage.lines_of(share.summary) if share.resume else None) or {}
    todo = [s for s in share.plan.written if not _is_moved(s, done, stage, share.out)]
    plan = dataclasses.replace(share.plan, shards=tuple(todo), side_files={})
    budget = memory_limit(plan, share.memory)
    try:
        check_space(plan, stage.out, already=stage.allocated())
        stage.open()
        kept = stage.resume(share.summary, plan.provenance, fresh=not share.resume)
        with InputFiles(plan.inputs) as files, one_thread_each(plan) as ready, reading_through(plan):
            writer = ShardWriter(stage, files, noted, budget, ready, plan.device)
            write_shards(plan, stage, kept, noted, writer, share.jobs)
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
    return noted.written


def _is_done(shard: ShardPlan, lines: Mapping[str, Any], stage: Path, out: Path) -> bool:
    """True for a journalled file in the task's stage or in the shared one, in this order: it moves that way."""
    return shard.file in lines and any((Stage(s).folder / shard.file).is_file() for s in (stage, out))


def _is_moved(shard: ShardPlan, lines: Mapping[str, Any], stage: Stage, out: Path) -> bool:
    return _is_done(shard, lines, stage.out, out) and not (stage.folder / shard.file).is_file()


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
            found is not None and all(_is_done(shard, found, stage, self._out) for shard in share)
            for found, share, stage in zip(lines, self._shares, self._stages, strict=True)
        )

    def expect_one_plan(self) -> None:
        """Refuse tasks that were given other inputs, or see them elsewhere: they would wait for one another for ever.

        Raises:
            Refused: names the first difference (`stage-differs`).
        """
        for each in self._stages:
            Stage(each).expect_plan(self._plan.summary)

    def share(self, task: Task, jobs: int, memory: int | None, *, resume: bool) -> Share:
        """What a worker needs for one task, and no more."""
        shards = tuple(self._shares[task.number - 1])
        read = {run.file for s in shards for e in s.entries for run in reads(e.tensor)}
        inputs = {path: identity for path, identity in self._plan.inputs.items() if path in read}
        plan = dataclasses.replace(self._plan, shards=shards, side_files={}, inputs=inputs, checks=())
        return Share(plan, self._plan.summary, self._out, self._stages[task.number - 1], jobs, memory, resume)

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
