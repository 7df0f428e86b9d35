"""Runs a plan: computes and copies into a stage folder, proves the result, publishes it with one rename.

Workers take pieces of work (a copied run, a row chunk) from one queue in file order and write them at their offsets, so
that one large file keeps every core busy. A finished shard is fsynced, renamed and journalled by a thread of its own.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from converter.check import check_written
from converter.copying import copy_run, write_all
from converter.errors import Refused, VerificationFailed, show
from converter.evaluate import Evaluator, Measures, shared_nodes
from converter.plan import RECEIPT_FILE, Entry, Plan, ShardPlan, chunk_cost
from converter.preflight import check_space, check_target, memory_limit
from converter.reading import InputFiles
from converter.stage import FILE_MODE, Stage, fsync_folder, write_durably
from converter.tensors import rows

FLUSH_BYTES = 256_000_000
"""Bytes of a file that may wait in the page cache before they are sent to the disk, beside the work on the rest."""

Accept = Callable[[Mapping[str, Measures]], None]
"""Called with every computed tensor's measures before the output is published; raises to stop it."""


class Reporter(Protocol):
    """Hears how a run goes on. Called from several threads."""

    def start(self, total_bytes: int, shards: int) -> None:
        """The run begins; `total_bytes` of weights in `shards` files are to be written."""

    def advance(self, count: int, tensor: str) -> None:
        """`count` more bytes are written; `tensor` is the one being worked on."""

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """A file of `size` bytes is durable; `resumed`: an earlier run wrote it."""

    def checking(self) -> None:
        """All is written; the check begins."""


@dataclass(frozen=True)
class Receipt:
    """What a run did.

    Attributes:
        content: what `rlhf-convert.json` holds.
        measures: of every computed tensor that reported any.
        reread: tensors found in the written files' headers; recomputed: pieces compared with their sources.
        seconds: wall time from the first byte to the rename.
    """

    content: Mapping[str, Any]
    measures: Mapping[str, Measures]
    reread: int
    recomputed: int
    seconds: float


@dataclass
class _Job:
    """An entry being computed: its evaluator, the chunks that are still to come and what they said."""

    evaluator: Evaluator
    pending: int
    checksums: list[int]
    measures: Measures = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Shard:
    """A shard being written."""

    plan: ShardPlan
    path: Path
    fd: int
    pending: int
    jobs: dict[str, _Job] = field(default_factory=dict)
    unflushed: int = 0


@dataclass(frozen=True)
class _Piece:
    """A unit of work: a whole copied entry, or rows `[start, stop)` of a computed one (chunk number `index`)."""

    shard: _Shard
    entry: Entry
    index: int = 0
    start: int = 0
    stop: int = 0


def write(
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
    """Write a plan's output folder; it appears under its name only once it is whole and checked.

    Args:
        jobs: worker threads.
        memory: bytes that the process may hold; None: what the machine has free.
        overwrite: replace an output that this tool made, after the new one is checked.
        resume: go on where an earlier run of the same plan was stopped.
        accept: a last look at the measures of all computed tensors.

    Raises:
        Refused: the target, the disk, the memory or an input does not allow it; nothing is published.
        VerificationFailed: what was written is not what it should be (the stage is kept and named).
        OSError: the disk failed; nothing is published, and the same call goes on from there.
    """
    begun = time.monotonic()
    stage = Stage(out)
    budget = memory_limit(plan, memory)
    if not stage.marker.exists():
        check_target(out, plan.inputs, overwrite=overwrite)
    stage_is_new = not os.path.lexists(stage.folder)
    if stage_is_new:
        check_space(plan, out)
    stage.open()
    try:
        stage.recover()
        check_target(out, plan.inputs, overwrite=overwrite)
        kept = stage.resume(plan.summary, fresh=not resume)
        with InputFiles(plan.inputs) as files:
            lines = _write_shards(plan, stage, files, kept, reporter, jobs, budget)
            measures = {n: m for line in lines.values() for n, m in line["measures"].items()}
            _refuse_new_nonfinite(measures, stage)
            if accept is not None:
                _accept(accept, measures, stage)
            content = receipt_content(plan, measures, verified=verify)
            _write_side_files(plan, stage, files, content)
            files.check_unchanged()
            reporter.checking()
            checked = check_written(plan, stage.folder, files) if verify else (0, 0)
        stage.publish(replace=overwrite)
    finally:
        stage.close()
    return Receipt(content, measures, *checked, seconds=time.monotonic() - begun)


def _accept(accept: Accept, measures: Mapping[str, Measures], stage: Stage) -> None:
    """Ask for the last look; after a refusal nothing new stays on disk."""
    try:
        accept(measures)
    except Refused:
        stage.discard()
        raise


def _write_shards(
    plan: Plan,
    stage: Stage,
    files: InputFiles,
    kept: Mapping[str, Any],
    reporter: Reporter,
    jobs: int,
    budget: int,
) -> dict[str, dict[str, Any]]:
    """Journal lines of all shards, by file; those of an earlier run are checked against what is on disk."""
    reporter.start(plan.total_bytes, len(plan.shards))
    lines: dict[str, dict[str, Any]] = {}
    todo: list[ShardPlan] = []
    for shard in plan.shards:
        line = kept.get(shard.file)
        if line is not None and _still_there(shard, line, stage.folder):
            lines[shard.file] = line
            reporter.advance(shard.size, "")
            reporter.shard_done(shard.file, shard.size, True)
        else:
            todo.append(shard)
    lines |= _Run(stage, files, reporter, budget).write(todo, jobs)
    return lines


def _still_there(shard: ShardPlan, line: Mapping[str, Any], folder: Path) -> bool:
    """True where a journalled shard is on disk with its size, its header and the checksums of its computed tensors."""
    try:
        fd = os.open(folder / shard.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_size != shard.size or os.pread(fd, len(shard.head), 0) != shard.head:
            return False
        return all(
            line["crc"].get(entry.name) == _checksums(fd, entry) for entry in shard.entries if entry.runs is None
        )
    finally:
        os.close(fd)


def _checksums(fd: int, entry: Entry) -> list[int]:
    return [zlib.crc32(os.pread(fd, length, offset)) for offset, length in chunk_extents(entry)]


def chunk_extents(entry: Entry) -> list[tuple[int, int]]:
    """Offset in the file and bytes of each chunk of a computed entry."""
    shape = entry.tensor.info.shape
    row = entry.length // (shape[0] if shape else 1) if entry.length else 0
    return [(entry.offset + start * row, (stop - start) * row) for start, stop in entry.chunks()]


class _Run:
    """Writes shards with several workers. An exception in any thread stops all, and is raised by `write`."""

    def __init__(self, stage: Stage, files: InputFiles, reporter: Reporter, budget: int) -> None:
        self._stage = stage
        self._files = files
        self._reporter = reporter
        self._budget = budget
        self._held = 0
        self._room = threading.Condition()
        self._next = threading.Lock()
        self._state = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._finished: SimpleQueue[_Shard | None] = SimpleQueue()
        self._open: set[int] = set()
        self._lines: dict[str, dict[str, Any]] = {}

    def write(self, shards: list[ShardPlan], jobs: int) -> dict[str, dict[str, Any]]:
        if any(e.runs is None for s in shards for e in s.entries):
            import torch

            torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
        pieces = self._pieces(shards)
        workers = [threading.Thread(target=self._work, args=(pieces,), name=f"worker-{n}") for n in range(jobs)]
        finisher = threading.Thread(target=self._finish, name="finisher")
        try:
            for thread in (*workers, finisher):
                thread.start()
            _join(workers)
            self._finished.put(None)
            _join([finisher])
        except BaseException as error:
            self._fail(error)
        finally:
            self._finished.put(None)
            for thread in (*workers, finisher):
                if thread.ident is not None:
                    thread.join()
            for fd in self._open:
                os.close(fd)
        if self._failure is not None:
            raise self._failure
        return self._lines

    def _fail(self, error: BaseException) -> None:
        with self._state:
            if self._failure is None:
                self._failure = error
        self._stop.set()
        with self._room:
            self._room.notify_all()

    def _pieces(self, shards: list[ShardPlan]) -> Iterator[_Piece]:
        """All work in file order; a shard's file is created when its first piece is taken."""
        for plan in shards:
            shard = self._create(plan)
            work: list[_Piece] = []
            for entry in plan.entries:
                if entry.runs is not None:
                    work.append(_Piece(shard, entry))
                else:
                    chunks = entry.chunks() or [(0, 0)]
                    evaluator = Evaluator(self._files, shared_nodes(entry.tensor))
                    shard.jobs[entry.name] = _Job(evaluator, len(chunks), [0] * len(chunks))
                    work += [_Piece(shard, entry, i, start, stop) for i, (start, stop) in enumerate(chunks)]
            shard.pending = len(work)
            yield from work

    def _create(self, plan: ShardPlan) -> _Shard:
        path = self._stage.folder / (plan.file + ".tmp")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        with self._state:
            self._open.add(fd)
        _reserve(fd, plan.size)
        write_all(fd, plan.head, 0)
        write_all(fd, plan.tail, plan.size - len(plan.tail))
        return _Shard(plan, path, fd, 0)

    def _work(self, pieces: Iterator[_Piece]) -> None:
        try:
            while not self._stop.is_set():
                with self._next:
                    piece = next(pieces, None)
                if piece is None:
                    return
                if piece.entry.runs is not None:
                    self._copy(piece)
                else:
                    self._compute(piece)
                self._done(piece.shard)
        except BaseException as error:
            self._fail(error)

    def _copy(self, piece: _Piece) -> None:
        offset = piece.entry.offset
        for run in piece.entry.runs or ():
            copy_run(self._files, run, piece.shard.fd, offset, lambda n: self._advance(piece, n))
            offset += run.length

    def _compute(self, piece: _Piece) -> None:
        entry, job = piece.entry, piece.shard.jobs[piece.entry.name]
        whole = piece.start == 0 and piece.stop == (entry.tensor.info.shape or (1,))[0]
        tensor = entry.tensor if whole else rows(entry.tensor, piece.start, piece.stop)
        cost = chunk_cost(tensor)
        self._take(cost)
        try:
            with job.lock:
                for node in job.evaluator.keep:
                    job.evaluator.evaluate(node, {})
            measures: Measures = {}
            value = job.evaluator.evaluate(tensor, measures)
            data = memoryview(value.reshape(-1).view(_bytes()).numpy())
            offset, length = chunk_extents(entry)[piece.index]
            assert length == len(data), entry.name
            write_all(piece.shard.fd, data, offset)
            checksum = zlib.crc32(data)
        finally:
            self._give(cost)
        with job.lock:
            job.checksums[piece.index] = checksum
            job.pending -= 1
            for key, number in measures.items():
                job.measures[key] = job.measures.get(key, 0.0) + number
            if job.pending == 0:
                job.evaluator.shared.clear()
        self._advance(piece, length)

    def _take(self, cost: int) -> None:
        """Wait until `cost` bytes fit beside what other workers hold; one piece alone always may go on."""
        with self._room:
            self._room.wait_for(lambda: self._stop.is_set() or self._held == 0 or self._held + cost <= self._budget)
            self._held += cost

    def _give(self, cost: int) -> None:
        with self._room:
            self._held -= cost
            self._room.notify_all()

    def _advance(self, piece: _Piece, count: int) -> None:
        if self._stop.is_set():
            raise _Stopped
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
        done: set[str] = set()
        try:
            while (shard := self._finished.get()) is not None:
                if self._stop.is_set():
                    return
                if shard.plan.file in done:
                    continue
                if shard.pending:
                    os.fdatasync(shard.fd)
                    continue
                self._publish_shard(shard)
                done.add(shard.plan.file)
        except BaseException as error:
            self._fail(error)

    def _publish_shard(self, shard: _Shard) -> None:
        os.fsync(shard.fd)
        os.rename(shard.path, self._stage.folder / shard.plan.file)
        fsync_folder(self._stage.folder)
        line = {
            "shard": shard.plan.file,
            "size": shard.plan.size,
            "crc": {name: job.checksums for name, job in shard.jobs.items()},
            "measures": {name: job.measures for name, job in shard.jobs.items() if job.measures},
        }
        self._stage.record(line)
        self._lines[shard.plan.file] = line
        with self._state:
            self._open.discard(shard.fd)
        os.close(shard.fd)
        self._reporter.shard_done(shard.plan.file, shard.plan.size, False)


class _Stopped(Exception):
    """Another thread failed; this one has nothing to add."""


def _join(threads: list[threading.Thread]) -> None:
    """Wait in short steps: a signal handler runs in the main thread, between them."""
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)


def _reserve(fd: int, size: int) -> None:
    """Ask for a file's blocks at once, so that a full disk shows before the work; not all filesystems can."""
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(fd, size)


_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


def _bytes() -> Any:
    import torch

    return torch.uint8


def _refuse_new_nonfinite(measures: Mapping[str, Measures], stage: Stage) -> None:
    broken = {name: int(m["nonfinite_new"]) for name, m in measures.items() if m.get("nonfinite_new")}
    if broken:
        name, count = max(broken.items(), key=lambda item: item[1])
        raise VerificationFailed(
            "new-nonfinite",
            f"{sum(broken.values())} values overflowed in {len(broken)} tensors, {count} of them in {show(name)}; "
            f"the inputs are finite there. Nothing was published; {show(stage.folder.name)} is kept",
            where=show(stage.out),
            next="write the result in a wider type: --dtype bfloat16, or --dtype float32",
        )


def receipt_content(plan: Plan, measures: Mapping[str, Measures], *, verified: bool) -> dict[str, Any]:
    """The receipt: what made this folder. The same inputs and recipe give the same bytes, on any machine."""
    return {
        **plan.provenance,
        "counts": plan.counts,
        "dropped": dict(plan.dropped),
        "tensors": {name: dict(sorted(m.items())) for name, m in sorted(measures.items())},
        "verified": verified,
    }


def _write_side_files(plan: Plan, stage: Stage, files: InputFiles, receipt: Mapping[str, Any]) -> None:
    for name, file in plan.side_files.items():
        content = file.content if file.content is not None else _read_whole(files, file.source or "")
        target = stage.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, content)
        if target.parent != stage.folder:
            fsync_folder(target.parent)
    write_durably(stage.folder / RECEIPT_FILE, (json.dumps(receipt, indent=2, sort_keys=True) + "\n").encode())
    fsync_folder(stage.folder)


def _read_whole(files: InputFiles, path: str) -> bytes:
    buffer = bytearray(os.fstat(files.descriptor(path)).st_size)
    files.read_into(path, 0, buffer)
    return bytes(buffer)
