"""Which bytes of the inputs an output reads: that no tensor is lost on the way, and which checksums matter."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence

from converter.core.checkpoint import Checkpoint, RecordCheck
from converter.core.tensors.byte_runs import Span, spans
from converter.core.tensors.nodes import LazyTensor
from converter.text import fold


def checks_of(tensors: Iterable[LazyTensor], checks: Sequence[RecordCheck]) -> tuple[RecordCheck, ...]:
    """The checks of stretches of which the tensors read any byte."""
    if not checks:
        return ()
    used = _spans(tensors)
    return tuple(c for c in dict.fromkeys(checks) if _touches((c.file, c.offset, c.offset + c.length), used))


def _spans(tensors: Iterable[LazyTensor]) -> dict[str, list[tuple[int, int]]]:
    """Stretches of each file that tensors read."""
    used: dict[str, list[tuple[int, int]]] = {}
    for tensor in tensors:
        for file, start, stop in spans(tensor):
            used.setdefault(file, []).append((start, stop))
    return {file: _union(found) for file, found in used.items()}


def unaccounted(inputs: Sequence[Checkpoint], output: Checkpoint) -> str | None:
    """Tensors of the inputs that are neither read by the output nor dropped by a step, folded; or None.

    A tensor of a file beside is named `FILE:NAME`, in `dropped` too.
    """
    merged = _spans([*output.all_tensors(), *output.left])
    lost = [
        name
        for given in inputs
        if given.origin.path not in output.set_aside
        for name, tensor in _named(given)
        if tensor.info.numel and name not in output.dropped and not any(_touches(s, merged) for s in spans(tensor))
    ]
    return fold(lost) if lost else None


def _named(given: Checkpoint) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor by name; one of a file beside by the file's name too, as the same tensor may be in two files."""
    yield from given.tensors.items()
    for file, tensors in given.beside.items():
        for name, tensor in tensors.items():
            yield f"{file}:{name}", tensor


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined


def _touches(span: Span, used: Mapping[str, list[tuple[int, int]]]) -> bool:
    file, start, stop = span
    known = used.get(file, [])
    at = bisect.bisect_left(known, (stop, 0))
    return at > 0 and known[at - 1][1] > start
