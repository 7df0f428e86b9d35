"""Two checkpoints compared by value, streamed: which tensors are equal, which changed and by how much.

Bytes are compared first, without torch; only tensors that differ are computed with, in row chunks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from converter.core.checkpoint import Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files import sparse
from converter.core.files.opening import Identity, read_limited
from converter.core.tensors import nodes as tensors
from converter.core.tensors.byte_runs import byte_runs
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, Steps
from converter.errors import UsageError
from converter.examine.meaning import Comparable, as_stored, by_meaning
from converter.text import show

if TYPE_CHECKING:
    import torch

    from converter.core.compute.evaluate import Evaluator

Status = Literal["equal", "rounded", "changed", "shape"]

CHUNK_BYTES = 1 << 24
"""Bytes of fp64 that a chunk of a tensor takes while two are compared."""

MAX_SIDE_FILE = 256_000_000


@dataclass(frozen=True)
class Pair:
    """A tensor of A and its partner in B.

    Attributes:
        status: `rounded`: B is A cast to B's dtype, bit by bit.
        relative: Frobenius norm of the difference over that of A, in fp64; infinity where A is zero.
        largest: the largest absolute difference.
        nonfinite: values that are NaN or infinite on one side only, or infinities of both signs.
        differing: elements that differ, in their bits where both have one dtype.
    """

    a: str
    b: str
    status: Status
    relative: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0
    differing: int = 0


@dataclass(frozen=True)
class Difference:
    """What two checkpoints do not share.

    Attributes:
        missing: names in A alone; `extra`: in B alone.
        config: keys of the configs whose values differ, with both.
        side_files: names of files that differ, or that one side alone has.
        prefixes: what was taken off the names of A and of B to pair them.
        said: how the names of A and of B were read, where they are not paired as they are stored.
        lost: tensors of A and of B that are empty, cut or in a file that is gone: what they were is not known.
        broken: what is wrong with A and with B, in words; two that are broken alike may have been different.
        tied: tensors that one side stores, and the other under a name to which its config ties them.
    """

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    config: Mapping[str, tuple[Any, Any]]
    side_files: Mapping[str, str]
    prefixes: tuple[str, str] = ("", "")
    dtypes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    said: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    tied: tuple[str, ...] = ()
    lost: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    broken: tuple[str, str] = ("", "")

    @property
    def is_empty(self) -> bool:
        """True where all is equal: names, values, dtypes, config and side files."""
        return not (
            self.missing
            or self.extra
            or self.config
            or self.side_files
            or any(self.broken)
            or any(p.status != "equal" for p in self.pairs)
        )


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    ignore_prefixes: Sequence[str] = (),
    told: Callable[[str, int], None] = lambda _name, _size: None,
) -> Difference:
    """Compare two checkpoints.

    Tensors are paired by their names. Where names differ they are read by what they mean (see `comparable`), if more of
    them meet so.

    Args:
        ignore_prefixes: taken off the names of both before they are paired; without any, the two prefixes under which
            the most names meet are found.
        told: called with each tensor's name and its size in bytes before it is read.

    Raises:
        UsageError: an adapter and a model (`kinds-differ`).
    """
    one, two = as_stored(a), as_stored(b)
    if one.tensors.keys() != two.tensors.keys() and not ignore_prefixes:
        one, two = _met(one, two, by_meaning(a), by_meaning(b))
    if {one.kind, two.kind} == {"adapter", "model"}:
        raise _kinds_differ(a, b)
    names_a, names_b, prefixes = _paired_names(list(one.tensors), list(two.tensors), ignore_prefixes)
    pairs, dtypes, tied = [], {}, []
    context = Context()
    with _evaluators(one.inputs, two.inputs) as (left, right):
        for key, name, other in _partners(names_a, names_b, one, two):
            x = one.tensors[name] if name else one.tied[key]
            y = two.tensors[other] if other else two.tied[key]
            told(name or other, x.info.nbytes)
            if not (name and other):
                tied.append(name or other)
            if x.info.dtype is not y.info.dtype:
                dtypes[name or key] = (x.info.dtype.torch_name, y.info.dtype.torch_name)
            pairs.append(_compare(name or key, other or key, x, y, context, left, right))
    return Difference(
        tuple(pairs),
        tuple(n for k, n in names_a.items() if k not in names_b and k not in two.tied),
        tuple(n for k, n in names_b.items() if k not in names_a and k not in one.tied),
        _configs(one.config, two.config),
        _side_files(one.side_files, two.side_files),
        prefixes,
        dtypes,
        (one.said, two.said),
        tuple(tied),
    )


def _met(one: Comparable, two: Comparable, other: Comparable, others: Comparable) -> tuple[Comparable, Comparable]:
    """The pair of namings in which the least is left over: as stored, or by meaning."""

    def left_over(a: Comparable, b: Comparable) -> int:
        names_a, names_b, _ = _paired_names(list(a.tensors), list(b.tensors), ())
        return len(names_a.keys() ^ names_b.keys())

    return (other, others) if left_over(other, others) < left_over(one, two) else (one, two)


def _partners(
    names_a: Mapping[str, str], names_b: Mapping[str, str], one: Comparable, two: Comparable
) -> Iterator[tuple[str, str, str]]:
    """What to compare: the common name, the name in A and in B; empty for what a side stores under a tied name only."""
    for key, name in names_a.items():
        if key in names_b:
            yield key, name, names_b[key]
        elif key in two.tied:
            yield key, name, ""
    for key, name in names_b.items():
        if key not in names_a and key in one.tied:
            yield key, "", name


def _kinds_differ(a: Checkpoint, b: Checkpoint) -> UsageError:
    adapter, model = (a, b) if a.origin.kind == "adapter" else (b, a)
    name, merged = adapter.origin.asked, model.origin.asked
    return UsageError(
        "kinds-differ",
        f"{name} is an adapter and {merged} a model: they share no tensor",
        next=Steps(Command("merge-lora", (name, "OUT")), ", then ", Command("diff", ("OUT", merged))),
    )


class _evaluators:  # noqa: N801 - a context manager that reads as a function
    """Evaluators over the files of both sides, which are closed at the end."""

    def __init__(self, a: Mapping[str, Identity], b: Mapping[str, Identity]) -> None:
        from converter.core.files.reading import InputFiles

        self._files = (InputFiles(a), InputFiles(b))

    def __enter__(self) -> tuple[Callable[[], Evaluator], Callable[[], Evaluator]]:
        def make(index: int) -> Callable[[], Evaluator]:
            def evaluator() -> Evaluator:
                from converter.core.compute.evaluate import Evaluator

                return Evaluator(self._files[index])

            return evaluator

        return make(0), make(1)

    def __exit__(self, *exc: object) -> None:
        for files in self._files:
            files.__exit__(*exc)


def _compare(
    name: str,
    other: str,
    a: LazyTensor,
    b: LazyTensor,
    context: Context,
    left: Callable[[], Evaluator],
    right: Callable[[], Evaluator],
) -> Pair:
    if a.info.shape != b.info.shape:
        return Pair(name, other, "shape")
    if a.info == b.info and (a == b or (byte_runs(a) is not None and byte_runs(b) is not None and context.equal(a, b))):
        return Pair(name, other, "equal")
    return _by_value(name, other, a, b, left(), right())


def _by_value(name: str, other: str, a: LazyTensor, b: LazyTensor, left: Evaluator, right: Evaluator) -> Pair:
    import torch

    difference = total = largest = 0.0
    odd = differing = 0
    rounded = True
    for start, stop in _chunks(a.info.shape):
        x = left.evaluate(tensors.rows(a, start, stop) if a.info.shape else a, {})
        y = right.evaluate(tensors.rows(b, start, stop) if b.info.shape else b, {})
        rounded = rounded and x.is_floating_point() and y.is_floating_point() and _same_bits(x.to(y.dtype), y)
        differing += _differing(x, y)
        wide, other_wide = _wide(x), _wide(y)
        finite = torch.isfinite(wide) & torch.isfinite(other_wide)
        odd += int((~finite & (wide != other_wide) & ~(torch.isnan(wide) & torch.isnan(other_wide))).sum())
        delta = torch.where(finite, _difference(x, y), 0.0)
        difference += float((delta * delta).sum())
        size = wide.abs()
        total += float(torch.where(torch.isfinite(size), size * size, 0.0).sum())
        largest = max(largest, float(delta.max()) if delta.numel() else 0.0)
    if x.dtype == y.dtype and not differing:
        return Pair(name, other, "equal")
    relative = math.sqrt(difference / total) if total else (math.inf if difference else 0.0)
    return Pair(name, other, "rounded" if rounded else "changed", relative, largest, odd, differing)


def _wide(value: torch.Tensor) -> torch.Tensor:
    import torch

    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _difference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Absolute differences in fp64; of integers exact, as fp64 can't tell neighbours past 2**53."""
    import torch

    if not (x.is_floating_point() or x.is_complex() or y.is_floating_point() or y.is_complex()):
        return (x.to(torch.int64) - y.to(torch.int64)).abs().double()
    return (_wide(x) - _wide(y)).abs()


def _differing(x: torch.Tensor, y: torch.Tensor) -> int:
    """Elements that differ: in their bits, or in value where the dtypes are two."""
    import torch

    if x.dtype == y.dtype:
        size = x.element_size()
        left, right = (v.contiguous().reshape(-1).view(torch.uint8).reshape(-1, size) for v in (x, y))
        return int((left != right).any(dim=1).sum())
    one, two = _wide(x), _wide(y)
    return int(((one != two) & ~(torch.isnan(one) & torch.isnan(two))).sum())


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    import torch

    if x.dtype != y.dtype:
        return False
    return torch.equal(x.contiguous().reshape(-1).view(torch.uint8), y.contiguous().reshape(-1).view(torch.uint8))


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    if not shape:
        yield 0, 1
        return
    width = math.prod(shape[1:])
    height = max(1, CHUNK_BYTES // 8 // max(1, width))
    for start in range(0, shape[0], height):
        yield start, min(shape[0], start + height)


def _paired_names(
    a: Sequence[str], b: Sequence[str], given: Sequence[str]
) -> tuple[dict[str, str], dict[str, str], tuple[str, str]]:
    """Names of both sides by what they are paired under, and the prefixes that were found."""
    if given:
        return _shortened(a, given), _shortened(b, given), ("", "")
    best = ("", "")
    met = len(set(a) & set(b))
    if met < min(len(a), len(b)):
        for one in _prefixes(a):
            for two in _prefixes(b):
                count = len({n.removeprefix(one) for n in a} & {n.removeprefix(two) for n in b})
                if count > met:
                    met, best = count, (one, two)
    names_a = {n.removeprefix(best[0]): n for n in a}
    names_b = {n.removeprefix(best[1]): n for n in b}
    if len(names_a) < len(a) or len(names_b) < len(b):  # a prefix that makes two names one pairs nothing
        return {n: n for n in a}, {n: n for n in b}, ("", "")
    return names_a, names_b, best


def _shortened(names: Sequence[str], prefixes: Sequence[str]) -> dict[str, str]:
    """Names by what is left of them without the prefixes that were given.

    Raises:
        UsageError: two names become one (`rename-collision`).
    """
    found: dict[str, str] = {}
    for name in names:
        first = found.setdefault(_without(name, prefixes), name)
        if first != name:
            what = f"without these prefixes {show(first)} and {show(name)} are one name, and one would not be compared"
            raise UsageError("rename-collision", what, next="a longer --ignore-prefix, or none")
    return found


def _without(name: str, prefixes: Sequence[str]) -> str:
    return next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)


def _prefixes(names: Sequence[str]) -> list[str]:
    """Prefixes that most names have, `base_model.model.` for one, and none."""
    found = [""]
    for depth in range(1, 5):
        counts: dict[str, int] = {}
        for name in names:
            parts = name.split(".")
            if len(parts) > depth:
                prefix = ".".join(parts[:depth]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
        found += [p for p, n in counts.items() if n * 2 > len(names)]
    return found


def _configs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    ignored = {"transformers_version", "_name_or_path", "peft_version"}
    keys = [k for k in dict.fromkeys([*a, *b]) if k not in ignored]
    return {k: (a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)}


def _side_files(a: Mapping[str, SideFile], b: Mapping[str, SideFile]) -> dict[str, str]:
    found = {}
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            found[name] = "only in B" if name not in a else "only in A"
        elif not _is_same(a[name], b[name]):
            found[name] = "differs"
    return found


def _is_same(a: SideFile, b: SideFile) -> bool:
    if a.source is not None and b.source is not None and sparse.same_content(a.source, b.source):
        return True
    return _digest(a) == _digest(b)


def _digest(file: SideFile) -> str:
    if file.content is not None:
        return hashlib.sha256(file.content).hexdigest()
    assert file.source is not None
    return hashlib.sha256(read_limited(Path(file.source), limit=MAX_SIDE_FILE)).hexdigest()
