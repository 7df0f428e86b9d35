"""Refusals before the first byte: where the output may go, and whether disk and memory suffice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from converter.core.files.names import RECEIPT
from converter.core.tensors.nodes import Apply, Stored, is_separable, rows
from converter.core.writer.plan import Plan
from converter.core.writer.shard_plan import Entry, chunk_cost
from converter.diagnostic import Again
from converter.errors import Refused
from converter.text import format_size, show

TORCH_MEMORY = 300_000_000
"""Resident bytes of the process once torch is imported and warm, about (measured: 0.22 GB after the import)."""

TORCH_FREE_MEMORY = 100_000_000
"""Resident bytes of a run that only copies."""


def check_target(out: Path, inputs: Iterable[str], *, overwrite: bool) -> None:
    """Refuse outputs that exist, nest with an input, or must never be replaced.

    Raises:
        Refused: `output-exists`, `output-nests`, `output-protected`, `output-foreign`.
    """
    if out.name in ("", ".."):
        raise _protected_target(out)
    resolved = out.resolve()
    for folder, path in _folders(inputs):
        if folder == resolved or resolved in folder.parents or folder in resolved.parents:
            raise Refused(
                "output-nests",
                "the output and an input lie inside one another",
                where=show(out),
                got=f"input {show(path)}",
                next="choose an output beside the input",
            )
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise Refused(
            "output-exists",
            "the output exists already",
            where=show(out),
            next="choose another name, or add --overwrite" if _is_ours(out) else "choose another name",
        )
    if out.is_symlink() or not out.is_dir() or os.path.ismount(out) or resolved in _protected():
        raise _protected_target(out)
    if not _is_ours(out):
        raise Refused(
            "output-foreign",
            f"the folder has files, and no {RECEIPT}: this tool did not make it",
            where=show(out),
            next="choose another name, or remove the folder yourself",
        )


def _folders(inputs: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """The folders of the inputs, each with one input: those named, and behind links those that files really lie in."""
    named: dict[str, Path] = {}
    for path in inputs:
        if (folder := os.path.dirname(path)) not in named:
            named[folder] = Path(folder).resolve()
            yield named[folder], path
        if os.path.islink(path):
            yield Path(path).resolve().parent, path


def _is_ours(out: Path) -> bool:
    """True for what `--overwrite` may replace: an empty folder, or one with a receipt."""
    return out.is_dir() and (not os.listdir(out) or (out / RECEIPT).is_file())


def _protected_target(out: Path) -> Refused:
    return Refused(
        "output-protected",
        "this is not a folder that may be written or replaced",
        where=show(out),
        next="choose another name",
    )


def _protected() -> set[Path]:
    current, home = Path.cwd().resolve(), Path.home().resolve()
    return {current, *current.parents, home, *home.parents}


def free_bytes(out: Path) -> int:
    """Bytes that a user may still write where `out` will be."""
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(plan: Plan, out: Path, *, already: int = 0, beside: int = 0) -> None:
    """Refuse a plan that the disk can't hold; `already` bytes of it are there, and `beside` are meant for others.

    Raises:
        Refused: `no-space`.
    """
    side = sum(len(f.content) if f.content is not None else _size(f.source) for f in plan.side_files.values())
    needed = plan.total_bytes + side + plan.total_bytes // 100 + beside
    free = free_bytes(out)
    if needed - already > free:
        raise Refused(
            "no-space",
            "the disk can't hold the output",
            where=show(out),
            expected=f"{format_size(needed - already)} free",
            got=f"{format_size(free)} free",
            next="free space, or choose an output on another disk",
        )


def _size(path: str | None) -> int:
    return os.stat(path).st_size if path else 0


def chunk_memory(plan: Plan) -> list[tuple[int, str]]:
    """Bytes that computing one chunk of each computed tensor holds, with its name, largest first."""
    costs = []
    known: dict[tuple[object, ...], int] = {}  # of matrices that differ in where their bytes lie alone
    for entry in plan.entries:
        if entry.runs is None:
            form = _form(entry)
            cost = None if form is None else known.get(form)
            if cost is None:
                start, stop = max(entry.chunks(), key=lambda c: c[1] - c[0], default=(0, 0))
                piece = rows(entry.matrix, start, stop) if is_separable(entry.matrix) else entry.matrix
                cost = chunk_cost(piece)
            if form is not None:
                known[form] = cost
            costs.append((cost, entry.name))
    return sorted(costs, reverse=True)


def _form(entry: Entry) -> tuple[object, ...] | None:
    """All that the cost of an entry's chunks depends on, where a kernel computes it of stored tensors alone."""
    match entry.tensor:
        case Apply() as made if all(isinstance(i, Stored) for i in made.inputs):
            return (made.kernel, made.params, entry.chunk_rows, *((i.info.dtype, i.info.shape) for i in made.inputs))
        case _:
            return None


def needed_memory(plan: Plan, jobs: int) -> int:
    """Resident bytes that the run will take at most, about: the process, and the largest chunk once a job."""
    costs = chunk_memory(plan)
    if not costs:
        return TORCH_FREE_MEMORY
    return TORCH_MEMORY + costs[0][0] * jobs


def memory_limit(plan: Plan, memory: int | None) -> int:
    """Bytes that chunks in flight may hold together.

    Args:
        memory: what the user allows the whole process; None: what the machine and its control group have free.

    Raises:
        Refused: one tensor alone needs more (`no-memory`); names it and the `--memory` it needs.
    """
    costs = chunk_memory(plan)
    allowed = memory if memory is not None else available_memory()
    if costs and TORCH_MEMORY + costs[0][0] > allowed:
        least = TORCH_MEMORY + costs[0][0]
        raise Refused(
            "no-memory",
            f"computing {show(costs[0][1])} takes more memory than "
            + ("--memory allows" if memory is not None else "this machine has free"),
            expected=format_size(least),
            got=format_size(allowed),
            next=Again(("--memory", f"{-(-least // 1_000_000)}MB"))
            if memory is not None
            else "run it on a machine with more memory",
        )
    return max(allowed - TORCH_MEMORY, 1)


def available_memory() -> int:
    """Bytes that this process can still get: the least of the machine's and the control groups' free memory."""
    free = [_meminfo_available()]
    for limit_file, used_file in _CGROUP_FILES:
        limit, used = _read_number(limit_file), _read_number(used_file)
        if limit is not None and used is not None:
            free.append(max(limit - used, 0))
    return min(free)


_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
