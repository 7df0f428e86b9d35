"""Runs a plan: computes and copies into a stage folder, proves the result, publishes it with one rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.compute.allocator import keep_freed_memory
from converter.core.compute.measures import Measures, with_ratios
from converter.core.files import sparse
from converter.core.files.links import LINKED, header_digest
from converter.core.files.names import FILES, RECEIPT
from converter.core.files.reading import InputFiles
from converter.core.writer.plan import Plan
from converter.core.writer.preflight import check_space, check_target, memory_limit
from converter.core.writer.proof import check_written
from converter.core.writer.record_checks import compare_records
from converter.core.writer.reporter import Estimating, Reporter
from converter.core.writer.shard_files import is_still_there
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.shard_writer import ShardWriter
from converter.core.writer.stage import Stage, fsync_folder, make_folders, write_durably
from converter.errors import Interrupted, Refused, VerificationFailed
from converter.text import show

Accept = Callable[[Mapping[str, Measures]], None]
"""Called with every computed tensor's measures before the output is published; raises to stop it."""

Take = Callable[[Stage, Mapping[str, Any]], dict[str, Any]]
"""Journal lines by file, with the files moved into the stage."""


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
    take: Take | None = None,
    already: int = 0,
) -> Receipt:
    """Write a plan's output folder; it appears under its name only once it is whole and checked.

    Args:
        jobs: worker threads.
        memory: bytes that the process may hold; None: what the machine has free.
        overwrite: replace an output that this tool made, after the new one is checked.
        resume: go on where an earlier run of the same plan was stopped.
        accept: a last look at the measures of all computed tensors.
        take: brings files that other processes wrote into the stage, and is told of those that are there.
        already: bytes of disk that those files hold.

    Raises:
        Refused: the target, the disk, the memory or an input does not allow it; nothing is published. What can be
            gone on from is kept for the next call, else nothing new stays on disk.
        VerificationFailed: what was written is not what it should be; the stage is kept and named.
        Interrupted: a signal came when the output was published already, and its predecessor not yet removed.
    """
    begun = time.monotonic()
    budget = memory_limit(plan, memory)
    stage = Stage(out)
    try:
        if not os.path.lexists(stage.marker):
            check_target(out, plan.inputs, overwrite=overwrite)
        check_space(plan, out, already=already + stage.allocated())
        stage.open()
        stage.recover(replace=overwrite)
        check_target(out, plan.inputs, overwrite=overwrite)
        kept = stage.resume(plan.summary, plan.provenance, fresh=not resume)
        kept = kept if take is None else take(stage, kept)
        with (
            InputFiles(plan.inputs, {c.file for c in plan.checks}) as files,
            one_thread_each(plan) as ready,
            reading_through(plan),
        ):
            writer = ShardWriter(stage, files, reporter, budget, ready, plan.device)
            lines = write_shards(plan, stage, kept, reporter, writer, jobs)
            measures = measures_of(plan, lines)
            refuse_new_nonfinite(measures, stage)
            if accept is not None:
                _accept(accept, measures, stage)
            compare_records(plan.checks, files, jobs)
            content = receipt_content(plan, measures, lines, verified=verify)
            _write_beside(plan, stage, files, content)
            reporter.checking("what is written")
            checked = check_written(plan, stage.folder, files) if verify else (0, 0)
        _expect_all_files(plan, stage)
        check_target(out, plan.inputs, overwrite=overwrite)
        stage.publish(replace=overwrite)
    except BaseException as error:
        _give_up(stage, error)
        raise
    finally:
        stage.close()
    return Receipt(content, measures, *checked, seconds=time.monotonic() - begun)


def _give_up(stage: Stage, error: BaseException) -> None:
    """Remove what no later call can go on from, and raise what the user is told in place of an error, if anything."""
    if not is_worth_keeping(stage, error):
        with contextlib.suppress(OSError):
            stage.discard()
    if isinstance(error, OSError):
        raise system_refused(error, stage) from error
    if isinstance(error, KeyboardInterrupt) and stage.is_published:
        what = "interrupted while the old output was removed; the new one is whole"
        raise Interrupted(error.args[0] if error.args else signal.SIGINT, what) from None


_NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors that the same command meets again: this path can't be written by this user."""

_SPOILT = ("input-changed", "input-cut", "input-missing", "input-corrupt", "download-corrupt")
"""Refusals after which what is in the stage may be made of other bytes than the next run reads."""


def is_worth_keeping(stage: Stage, error: BaseException) -> bool:
    """Whether the same call can go on from what is in the stage: not once an input is another one."""
    if isinstance(error, Refused) and error.code in _SPOILT:
        return False
    return stage.is_ours if isinstance(error, KeyboardInterrupt | VerificationFailed) else stage.has_work


def system_refused(error: OSError, stage: Stage) -> Refused:
    """An error of the operating system in a user's words."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = "the disk is full" if full else f"the system refused: {error.strerror or error}"
    if stage.is_published:
        what, then = f"{said}, while the old output was removed; the new one is whole", "remove the old one"
    else:
        kept = f" with what is kept in {show(stage.folder.name)}" if stage.has_work else ""
        what = f"{said}; nothing was published"
        then = f"{'free space, then ' if full else ''}repeat the same command; it goes on{kept}"
        if error.errno in _NOT_HERE and not stage.has_work:
            then = "choose an output in a folder that you can write to"
    where = show(error.filename if isinstance(error.filename, str) else stage.out)
    return Refused("no-space" if full else "system", what, where=where, next=then)


@contextlib.contextmanager
def one_thread_each(plan: Plan) -> Iterator[Callable[[], object]]:
    """Workers share the cores, so each computes on one thread; and results must not depend on how many there are.

    Yields what a worker calls before it computes: it waits for torch, which is imported beside the first copies.
    """
    if all(entry.runs is not None for entry in plan.entries):
        yield lambda: None
        return
    from converter.core.compute.evaluate import importing_on_one_thread

    keep_freed_memory()
    with importing_on_one_thread(plan.device) as ready:
        yield ready


def reading_through(plan: Plan) -> contextlib.AbstractContextManager[None]:
    """What lies on the Hub is fetched ahead, and no more of it kept here than one file of the output has bytes."""
    return sparse.reading_through(max((s.size for s in plan.written), default=0))


def _accept(accept: Accept, measures: Mapping[str, Measures], stage: Stage) -> None:
    """Ask for the last look; after a refusal nothing new stays on disk."""
    try:
        accept(measures)
    except Refused:
        stage.discard()
        raise


def write_shards(
    plan: Plan, stage: Stage, kept: Mapping[str, Any], reporter: Reporter, writer: ShardWriter, jobs: int
) -> dict[str, dict[str, Any]]:
    """Journal lines of all shards, by file; those of an earlier run are checked against what is on disk."""
    reporter.start(plan.total_bytes, len(plan.written))
    if isinstance(reporter, Estimating):
        reporter.computing({entry.name: entry.length for entry in plan.entries if entry.runs is None})
    lines: dict[str, dict[str, Any]] = {}
    todo: list[ShardPlan] = []
    if kept:
        reporter.checking("what an earlier run wrote")
    for shard in plan.written:
        line = kept.get(shard.file)
        if line is not None and is_still_there(shard, line, stage.folder):
            lines[shard.file] = line
            reporter.shard_done(shard.file, shard.size, True)
        else:
            todo.append(shard)
    return lines | writer.write(todo, jobs)


def measures_of(plan: Plan, lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Measures]:
    """Measures by tensor, in the order of the plan; where two files have one name, by `FILE:NAME` in the second."""
    found: dict[str, Measures] = {}
    for shard in plan.written:
        for name, measures in lines[shard.file]["measures"].items():
            if measures:
                found[f"{shard.file}:{name}" if name in found else name] = measures
    return found


def refuse_new_nonfinite(measures: Mapping[str, Measures], stage: Stage) -> None:
    """Stop where a computed tensor overflowed.

    Raises:
        VerificationFailed: a value is infinite or NaN, and the inputs are finite there (`new-nonfinite`).
    """
    broken = {name: int(m["nonfinite_new"]) for name, m in measures.items() if m.get("nonfinite_new")}
    if broken:
        name, count = max(broken.items(), key=lambda item: item[1])
        raise VerificationFailed(
            "new-nonfinite",
            f"{sum(broken.values())} values overflowed in {len(broken)} tensors, {count} of them in {show(name)}; "
            f"the inputs are finite there. Nothing was published; {show(stage.folder.name)} is kept",
            where=show(stage.out),
            next="write the result in a wider type: --no-resume with --dtype bfloat16, or with --dtype float32",
        )


def receipt_content(
    plan: Plan, measures: Mapping[str, Measures], lines: Mapping[str, Mapping[str, Any]], *, verified: bool
) -> dict[str, Any]:
    """The receipt: what made this folder. The same inputs and recipe give the same bytes, on any machine.

    Args:
        lines: journal lines of the files that were written.
    """
    linked = {s.file: {"size": s.size, "header": header_digest(s.header)} for s in plan.linked}
    return {
        **plan.provenance,
        **({LINKED: linked} if linked else {}),
        "counts": plan.counts,
        "dropped": dict(plan.dropped),
        FILES: {s.file: _checksums(s, lines[s.file]) for s in plan.written if "whole" in lines[s.file]},
        "tensors": {name: with_ratios(m) for name, m in sorted(measures.items())},
        "verified": verified,
    }


def _checksums(shard: ShardPlan, line: Mapping[str, Any]) -> dict[str, Any]:
    """CRC-32 of a file and of each of its tensors, in hexadecimal."""
    tensors = {e.name: f"{crc:08x}" for e, crc in zip(shard.entries, line["sums"], strict=True)}
    return {"size": shard.size, "crc32": f"{line['whole']:08x}", "tensors": tensors}


def receipt_text(receipt: Mapping[str, Any]) -> bytes:
    """The receipt as a file."""
    return (json.dumps(receipt, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_beside(plan: Plan, stage: Stage, files: InputFiles, receipt: Mapping[str, Any]) -> None:
    """Links, side files and the receipt; after them no input is read but for the check."""
    for shard in plan.linked:
        stage.link(shard.file, shard.link or "")
    _write_side_files(plan, stage, files, receipt)
    files.check_unchanged()


def _write_side_files(plan: Plan, stage: Stage, files: InputFiles, receipt: Mapping[str, Any]) -> None:
    for name, file in plan.side_files.items():
        content = file.content if file.content is not None else read_whole(files, file.source or "")
        target = stage.folder / name
        make_folders(target.parent)
        write_durably(target, content)
        if target.parent != stage.folder:
            fsync_folder(target.parent)
    write_durably(stage.folder / RECEIPT, receipt_text(receipt))
    fsync_folder(stage.folder)


def _expect_all_files(plan: Plan, stage: Stage) -> None:
    """The last look before the rename: every file that was planned, and no other."""
    expected = {s.file for s in plan.shards} | {*plan.side_files, RECEIPT}
    if wrong := stage.files() ^ expected:
        raise VerificationFailed(
            "written-differs",
            f"files are missing or were put there by others: {show(sorted(wrong))}; nothing was published",
            where=show(stage.folder),
            next="run the same command again with --no-resume",
        )


def read_whole(files: InputFiles, path: str) -> bytes:
    """All bytes of a small input."""
    buffer = bytearray(os.fstat(files.descriptor(path)).st_size)
    files.read_into(path, 0, buffer)
    return bytes(buffer)
