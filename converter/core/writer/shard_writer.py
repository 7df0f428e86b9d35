"""Shards written by several workers: copies and row chunks go to their offsets, finished files become durable.

Workers take pieces of work (a copied entry, a row chunk) from one queue in file order and write them at their
offsets, so that one large file keeps every core busy. A finished shard is fsynced, renamed and journalled by a thread
of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from converter.core.compute.evaluate import Evaluator, as_bytes, evaluator
from converter.core.compute.finite import ZEROS, ValuesSeen, note_kept
from converter.core.compute.measures import Measures
from converter.core.files.checksums import crc32, joined
from converter.core.files.reading import InputFiles
from converter.core.tensors.nodes import LazyTensor, rows
from converter.core.writer.copying import copy_run, new_buffer, write_all
from converter.core.writer.shard_files import close_archive, reserve, whole_checksum
from converter.core.writer.shard_plan import Entry, ShardPlan, chunk_cost
from converter.core.writer.stage import FILE_MODE, Stage, fsync_folder, make_folders

if TYPE_CHECKING:
    from converter.core.writer.reporter import Reporter

FLUSH_BYTES = 32_000_000
"""Bytes of a file that may wait in the page cache before they are sent to the disk, beside the work on the rest.

With 256 MB the disk is idle while the first of them are copied, and again at the end of each file (measured: a gather
of 6.3 GB took 25.0 s, with 32 MB 20.6 s, `cp` and `sync` 24.5 s)."""


class _Stopped(Exception):
    """Another thread failed; this one has nothing to add."""


@dataclass
class _Job:
    """An entry being computed: its evaluator, the chunks that are still to come, and what each of them said.

    Attributes:
        costs: bytes that computing a chunk holds, by its number of rows.
    """

    evaluator: Evaluator
    checksums: list[int]
    measures: list[Measures]
    pending: int
    costs: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, entry: Entry, files: InputFiles, device: str | None) -> Self:
        """A job with everything still to come."""
        count = len(entry.extents)
        return cls(evaluator(entry.matrix, files, device), [0] * count, [{} for _ in range(count)], count)

    def cost(self, tensor: LazyTensor, height: int) -> int:
        """Bytes held while `tensor` is computed, a chunk of `height` rows."""
        if height not in self.costs:
            self.costs[height] = chunk_cost(tensor)
        return self.costs[height]

    def checksum(self, entry: Entry) -> int:
        """CRC-32 of the whole tensor: its chunks follow each other in the file."""
        found = 0
        for crc, (_, length) in zip(self.checksums, entry.extents, strict=True):
            found = joined(found, crc, length)
        return found

    def total(self) -> Measures:
        """Measures of all chunks, added in their order: a sum of floats depends on it, and the receipt must not."""
        total: Measures = {}
        for measures in self.measures:
            for key, number in measures.items():
                total[key] = total.get(key, 0.0) + number
        return total


@dataclass
class _Shard:
    """A shard being written.

    Attributes:
        sums: CRC-32 of each whole tensor, which the receipt records, and the zip of a torch file.
        copied: what was seen of copied tensors, of those that hold values that are not finite, or nothing but zeros.
    """

    plan: ShardPlan
    path: Path
    fd: int
    pending: int = 0
    jobs: dict[str, _Job] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    copied: dict[str, Measures] = field(default_factory=dict)
    unflushed: int = 0


@dataclass(frozen=True)
class _Piece:
    """A unit of work: a whole copied entry, or rows `[start, stop)` of a computed one (chunk number `index`)."""

    shard: _Shard
    entry: Entry
    index: int = 0
    start: int = 0
    stop: int = 0


class ShardWriter:
    """Writes shards into a stage with several workers. An exception in any thread stops all; `write` raises it."""

    def __init__(
        self,
        stage: Stage,
        files: InputFiles,
        reporter: Reporter,
        budget: int,
        ready: Callable[[], object],
        device: str | None = None,
    ) -> None:
        self._stage = stage
        self._device = device
        self._files = files
        self._reporter = reporter
        self._budget = budget
        self._ready = ready
        self._held = 0
        self._room = threading.Condition()
        self._next = threading.Lock()
        self._state = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._finished: SimpleQueue[_Shard | None] = SimpleQueue()
        self._open: dict[int, Path] = {}
        self._lines: dict[str, dict[str, Any]] = {}

    def write(self, shards: list[ShardPlan], jobs: int) -> dict[str, dict[str, Any]]:
        """Write `shards` with `jobs` workers; their journal lines by file name."""
        pieces = self._pieces(shards)
        workers = [threading.Thread(target=self._work, args=(pieces,), name=f"worker-{n}") for n in range(jobs)]
        finisher = threading.Thread(target=self._finish, name="finisher")
        with _signals_noted() as deliver:
            try:
                for thread in (*workers, finisher):
                    thread.start()
                _join(workers, deliver)
                self._finished.put(None)
                _join([finisher], deliver)
            except BaseException as error:
                self._fail(error)
            finally:
                self._finished.put(None)
                for thread in (*workers, finisher):
                    if thread.ident is not None:
                        thread.join()
                self._drop_unfinished()
        if self._failure is not None:
            raise self._failure
        return self._lines

    def _drop_unfinished(self) -> None:
        """Close half-written files and give their space back: a later run begins each shard anew."""
        for fd, path in self._open.items():
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink()

    def _fail(self, error: BaseException) -> None:
        with self._state:
            if self._failure is None:
                self._failure = error
        self._stop.set()
        with self._room:
            self._room.notify_all()

    def _pieces(self, shards: list[ShardPlan]) -> Iterator[_Piece]:
        """All work, file by file; a shard's file is created when its first piece is taken."""
        for plan in shards:
            shard = self._create(plan)
            work: list[_Piece] = []
            for entry in plan.entries:
                if entry.runs is not None:
                    work.append(_Piece(shard, entry))
                else:
                    shard.jobs[entry.name] = _Job.of(entry, self._files, self._device)
                    work += [_Piece(shard, entry, i, start, stop) for i, (start, stop) in enumerate(entry.chunks())]
            shard.pending = len(work)
            # Copies first: torch is being imported.
            yield from sorted(work, key=lambda piece: piece.entry.runs is None)

    def _create(self, plan: ShardPlan) -> _Shard:
        path = self._stage.folder / (plan.file + ".tmp")
        make_folders(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        with self._state:
            self._open[fd] = path
        reserve(fd, plan.size)
        write_all(fd, plan.header, 0)
        write_all(fd, plan.tail, plan.size - len(plan.tail))
        return _Shard(plan, path, fd)

    def _work(self, pieces: Iterator[_Piece]) -> None:
        buffer = new_buffer()
        try:
            while not self._stop.is_set():
                with self._next:
                    piece = next(pieces, None)
                if piece is None:
                    return
                if piece.entry.runs is not None:
                    self._copy(piece, buffer)
                else:
                    self._compute(piece)
                self._done(piece.shard)
        except BaseException as error:
            self._fail(error)

    def _copy(self, piece: _Piece, buffer: memoryview) -> None:
        offset, crc, out = piece.entry.offset, 0, piece.shard.fd
        seen = ValuesSeen(piece.entry.tensor.info.dtype)

        def advance(count: int) -> None:
            self._advance(piece, count)

        for run in piece.entry.runs or ():
            crc = copy_run(self._files, run, out, offset, buffer=buffer, start=crc, advance=advance, look=seen.add)
            offset += run.length
        piece.shard.sums[piece.entry.name] = crc
        if seen.count:
            piece.shard.copied[piece.entry.name] = {"nonfinite_kept": float(seen.count)}
        elif seen.zeros and seen.zeros == piece.entry.tensor.info.numel:
            piece.shard.copied[piece.entry.name] = {ZEROS: float(seen.zeros)}

    def _expect_no_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _compute(self, piece: _Piece) -> None:
        entry, job = piece.entry, piece.shard.jobs[piece.entry.name]
        whole = piece.start == 0 and piece.stop == (entry.matrix.info.shape or (1,))[0]
        tensor = entry.matrix if whole else rows(entry.matrix, piece.start, piece.stop)
        cost = job.cost(tensor, piece.stop - piece.start)
        self._ready()
        self._take(cost)
        try:
            with job.lock:
                job.evaluator.share()
            measures: Measures = {}
            data = as_bytes(job.evaluator.evaluate(tensor, measures))
            offset, length = entry.extents[piece.index]
            assert length == len(data), entry.name
            write_all(piece.shard.fd, data, offset)
            crc = crc32(data)
            note_kept(data, tensor.info.dtype, measures)
        finally:
            self._give(cost)
        with job.lock:
            job.checksums[piece.index] = crc
            job.measures[piece.index] = measures
            job.pending -= 1
            whole = job.pending == 0
            if whole:
                job.evaluator.shared.clear()
        if whole:
            piece.shard.sums[entry.name] = job.checksum(entry)
        self._advance(piece, length)

    def _take(self, cost: int) -> None:
        """Wait until `cost` bytes fit beside what other workers hold; one piece alone always may go on."""
        with self._room:
            self._room.wait_for(lambda: self._stop.is_set() or self._held == 0 or self._held + cost <= self._budget)
            if self._stop.is_set():
                raise _Stopped
            self._held += cost

    def _give(self, cost: int) -> None:
        with self._room:
            self._held -= cost
            self._room.notify_all()

    def _advance(self, piece: _Piece, count: int) -> None:
        self._expect_no_stop()
        self._reporter.advance(count, piece.entry.name)
        flush = False
        with self._state:
            piece.shard.unflushed += count
            if piece.shard.unflushed >= FLUSH_BYTES:
                piece.shard.unflushed, flush = 0, True
        if flush:
            self._finished.put(piece.shard)

    def _done(self, shard: _Shard) -> None:
        with self._state:
            shard.pending -= 1
            last = shard.pending == 0
        if last:
            self._finished.put(shard)

    def _finish(self) -> None:
        """Flush files that are being written, and finish those that are complete."""
        try:
            while (shard := self._finished.get()) is not None:
                if self._stop.is_set():
                    return
                if shard.plan.file in self._lines:
                    continue
                if shard.pending:
                    os.fdatasync(shard.fd)
                else:
                    self._make_durable(shard)
        except BaseException as error:
            self._fail(error)

    def _make_durable(self, shard: _Shard) -> None:
        sums = [shard.sums[e.name] for e in shard.plan.entries]
        if shard.plan.is_torch:
            close_archive(shard.fd, shard.plan, sums)
        os.fsync(shard.fd)
        os.rename(shard.path, shard.path.with_name(shard.path.name.removesuffix(".tmp")))
        fsync_folder(shard.path.parent)
        line = {
            "shard": shard.plan.file,
            "size": shard.plan.size,
            "crc": {name: job.checksums for name, job in shard.jobs.items()},
            "measures": {**shard.copied, **{name: job.total() for name, job in shard.jobs.items()}},
            "sums": sums,
            "whole": whole_checksum(shard.fd, shard.plan, sums),
        }
        self._stage.record(line)
        self._lines[shard.plan.file] = line
        with self._state:
            del self._open[shard.fd]
        os.close(shard.fd)
        self._reporter.shard_done(shard.plan.file, shard.plan.size, False)


@contextlib.contextmanager
def _signals_noted() -> Iterator[Callable[[], None]]:
    """Signals wait until the function that is yielded is called, which may raise what their handlers raise.

    An exception out of a handler inside `Thread.join` makes a running thread look finished, and its files would be
    closed under it. Source: https://github.com/python/cpython/issues/90882
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, note)

    def deliver() -> None:
        while received:
            number = received.pop(0)
            handlers[number](number, None)

    try:
        yield deliver
    finally:
        for held, handler in handlers.items():
            if signal.getsignal(held) is note:  # else a handler has chosen another one for the next signal
                signal.signal(held, handler)
        deliver()


def _join(threads: list[threading.Thread], deliver: Callable[[], None]) -> None:
    """Wait in short steps, with signals between them."""
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)
            deliver()
