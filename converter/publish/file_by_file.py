"""A plan's output goes where no folder is, with room for one of its files here: each is written, checked, sent and
removed, then the next.

What was sent is journalled: the same command goes on where an earlier run was stopped.
"""

from __future__ import annotations

import abc
import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from converter.core.files.names import RECEIPT
from converter.core.files.reading import InputFiles
from converter.core.writer.plan import Plan
from converter.core.writer.preflight import check_space, memory_limit
from converter.core.writer.proof import check_written
from converter.core.writer.record_checks import compare_records
from converter.core.writer.reporter import Reporter
from converter.core.writer.shard_files import is_still_there
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.shard_writer import ShardWriter
from converter.core.writer.stage import Stage
from converter.core.writer.write import (
    Accept,
    Receipt,
    is_worth_keeping,
    measures_of,
    one_thread_each,
    read_whole,
    reading_through,
    receipt_content,
    receipt_text,
    refuse_new_nonfinite,
    system_refused,
)
from converter.errors import Interrupted
from converter.publish.manifest import LocalFile


@dataclass(frozen=True)
class Knobs:
    """How to write and send.

    Attributes:
        place: the name beside which the stage lies.
        destination: where the files go, as the journal names it: another run's files do not go on elsewhere.
        memory: bytes that the run may hold; None: what the machine has free.
    """

    place: Path
    destination: str
    reporter: Reporter
    jobs: int = 1
    memory: int | None = None
    resume: bool = True
    verify: bool = True
    accept: Accept | None = None


@dataclass(frozen=True)
class Work:
    """What a sender writes with."""

    plan: Plan
    knobs: Knobs
    stage: Stage
    files: InputFiles
    budget: int
    ready: Callable[[], object]


class Sender(abc.ABC):
    """Brings one file after another to where they go.

    Attributes:
        lines: journal lines by file, for the measures.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.lines: dict[str, Mapping[str, Any]] = {}
        self.reread = self.recomputed = 0

    @abc.abstractmethod
    def is_there(self, shard: ShardPlan, line: Mapping[str, Any]) -> bool:
        """Whether an earlier run sent the file, and it is there still."""

    @abc.abstractmethod
    def bring(self, shard: ShardPlan, line: Mapping[str, Any], path: Path) -> None:
        """Send a file that was written and checked, journal that, and set its line."""

    def copies(self, shard: ShardPlan) -> bool:
        """Whether the file came to its place without being here."""
        return False

    def send(self, shard: ShardPlan, line: Mapping[str, Any] | None) -> None:
        """Bring a file to its place, if it is not there."""
        work = self.work
        if line is not None and self.is_there(shard, line):
            self.lines[shard.file] = line
            self._skip(shard, resumed=True)
            return
        if self.copies(shard):
            self._skip(shard, resumed=False)
            return
        path = work.stage.folder / shard.file
        if line is not None and is_still_there(shard, line, work.stage.folder):
            self._skip(shard, resumed=True)
        else:
            writer = ShardWriter(work.stage, work.files, work.knobs.reporter, work.budget, work.ready, work.plan.device)
            line = writer.write([shard], work.knobs.jobs)[shard.file]
        if work.knobs.verify:
            alone = dataclasses.replace(work.plan, shards=(shard,), side_files={})
            reread, recomputed = check_written(alone, work.stage.folder, work.files)
            self.reread, self.recomputed = self.reread + reread, self.recomputed + recomputed
        self.bring(shard, line, path)
        path.unlink()

    def _skip(self, shard: ShardPlan, *, resumed: bool) -> None:
        if not resumed:
            self.work.knobs.reporter.advance(shard.size, "")
        self.work.knobs.reporter.shard_done(shard.file, shard.size, resumed)


S = TypeVar("S", bound=Sender)
P = TypeVar("P")

Finish = Callable[[S, Mapping[str, Any], list[LocalFile]], P]
"""Makes a model of what was sent, given the receipt's content and the files beside the weights, the receipt last."""


def send_plan(
    plan: Plan, knobs: Knobs, start: Callable[[Work, Mapping[str, Any]], S], finish: Finish[S, P]
) -> tuple[Receipt, S, P]:
    """Write a plan's files and send each.

    Args:
        start: makes the sender; is told of the journal's lines of an earlier run, and may refuse the place.

    Raises:
        Refused: the disk, the memory, an input or the place does not allow it.
        VerificationFailed: what was written is not what it should be.
        Interrupted: a signal came; the same command goes on.
    """
    begun, budget = time.monotonic(), memory_limit(plan, knobs.memory)
    largest = max(plan.shards, key=lambda s: s.size)
    stage = Stage(knobs.place.absolute())
    try:
        check_space(dataclasses.replace(plan, shards=(largest,)), stage.out, already=stage.allocated())
        stage.open()
        kept = stage.resume(plan.summary | {"destination": knobs.destination}, plan.provenance, fresh=not knobs.resume)
        with (
            InputFiles(plan.inputs, {c.file for c in plan.checks}) as files,
            one_thread_each(plan) as ready,
            reading_through(plan),
        ):
            sender = start(Work(plan, knobs, stage, files, budget, ready), kept)
            knobs.reporter.start(plan.total_bytes, len(plan.shards))
            for shard in plan.shards:
                sender.send(shard, kept.get(shard.file))
            measures = measures_of(plan, sender.lines)
            refuse_new_nonfinite(measures, stage)
            if knobs.accept is not None:
                knobs.accept(measures)
            compare_records(plan.checks, files, knobs.jobs)
            content = receipt_content(plan, measures, sender.lines, verified=knobs.verify)
            beside = _beside(plan, files, content)
            files.check_unchanged()
        knobs.reporter.checking("what was sent")
        finished = finish(sender, content, beside)
        stage.discard()
    except BaseException as error:
        if not is_worth_keeping(stage, error):
            stage.discard()
        if isinstance(error, OSError):
            raise system_refused(error, stage) from error
        if isinstance(error, KeyboardInterrupt):
            what = "interrupted, nothing published: the same command again goes on with what was sent"
            raise Interrupted(error.args[0] if error.args else signal.SIGINT, what) from None
        raise
    finally:
        stage.close()
    receipt = Receipt(content, measures, sender.reread, sender.recomputed, time.monotonic() - begun)
    return receipt, sender, finished


def _beside(plan: Plan, files: InputFiles, receipt: Mapping[str, Any]) -> list[LocalFile]:
    """The files beside the weights, and the receipt, in memory."""
    contents = {
        name: file.content if file.content is not None else read_whole(files, file.source or "")
        for name, file in plan.side_files.items()
    }
    contents[RECEIPT] = receipt_text(receipt)
    return [LocalFile(name, Path(name), len(content), content) for name, content in contents.items()]
