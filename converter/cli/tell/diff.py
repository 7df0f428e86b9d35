"""`rlhf-convert diff`: two checkpoints by value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from converter.cli.lines import line
from converter.cli.options import Display
from converter.cli.progress import progress
from converter.errors import ConvertError, Refused
from converter.recipe.verbs.open import opened
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.examine.diff import Difference, Pair

MOST = 8
"""Lines of changed tensors that the screen shows without `-v`."""

MAX_VALUE = 60


def diff(a: str, b: str, ignore_prefix: tuple[str, ...], options: Display) -> int:
    """Compare; exit code 0 where all is equal, else 1."""
    from converter.examine.diff import compare

    (one, lost, fault), (two, others, other_fault) = _open(a), _open(b)
    with progress(options.sink) as reporter:
        reporter.start(one.total_bytes, 0)
        found = compare(one, two, ignore_prefixes=ignore_prefix, told=lambda name, size: reporter.advance(size, name))
    found = dataclasses.replace(found, lost=(lost, others), broken=(fault, other_fault))
    options.sink.screen(
        [
            line("a", f"{show(a)}  {one.origin.kind}, {len(one.tensors)} tensors"),
            line("b", f"{show(b)}  {two.origin.kind}, {len(two.tensors)} tensors"),
            *screen(found, verbose=options.verbose),
        ]
    )
    options.sink.json(to_json(found))
    return 0 if found.is_empty else 1


def _open(text: str) -> tuple[Checkpoint, tuple[str, ...], str]:
    """A checkpoint as `opened` finds it, its tensors that are empty or in files that are gone, and why they are.

    Raises:
        UsageError, Refused: see `opened`; faults other than lost tensors.
    """
    from converter.sources.hf.broken import LOST
    from converter.sources.opening import input_spec, open_checkpoint

    try:
        return opened(text), (), ""
    except Refused as error:
        if error.code not in LOST:
            raise
        refusal = error
    try:
        spec = dataclasses.replace(input_spec(text), broken=True)
        found = open_checkpoint(spec, token=None, keep_code=False)
    except ConvertError:
        raise refusal from None
    lost = tuple(n for n, t in found.tensors.items() if t.info.shape == (0,))
    if len(lost) == len(found.tensors):
        raise refusal
    kept = {n: t for n, t in found.tensors.items() if n not in lost}
    return found.replace(tensors=kept, ties=(), beside={}), lost, f"{refusal.code}: {refusal.what}"


def screen(found: Difference, *, verbose: bool = False) -> list[str]:
    """The difference as lines, the largest change first."""
    lines = []
    for side, said in zip("ab", found.said, strict=True):
        lines += [line("read", f"{side} {'; '.join(said)}")] if said else []
    for side, fault, lost in zip("ab", found.broken, found.lost, strict=True):
        if fault:
            lines.append(line("broken", f"{side} {fault}"))
        if lost:
            lines.append(line("lost", f"{len(lost)} tensors of {side} are empty or gone: {fold(lost)}"))
    if found.tied:
        lines.append(line("tied", f"{fold(found.tied)}: stored on one side, and tied to a stored tensor on the other"))
    if any(found.prefixes):
        one, two = (f"`{show(p)}`" if p else "nothing" for p in found.prefixes)
        lines.append(line("names", f"paired without {one} in a and {two} in b"))
    by_status: dict[str, list[Pair]] = {}
    for pair in found.pairs:
        by_status.setdefault(pair.status, []).append(pair)
    if "equal" in by_status:
        lines.append(line("equal", f"{len(by_status['equal'])} tensors, bit by bit"))
    if "rounded" in by_status:
        lines.append(line("rounded", f"{len(by_status['rounded'])} tensors of b are those of a in another dtype"))
    for name, (one, two) in list(found.dtypes.items())[: None if verbose else 1]:
        lines.append(line("dtype", f"{show(name)}: {one} in a, {two} in b" + _more(found.dtypes, verbose)))
    changed = sorted(by_status.get("changed", []), key=lambda p: -p.relative)
    if changed:
        counted = "1 tensor" if len(changed) == 1 else f"{len(changed)} tensors"
        lines.append(line("changed", f"{counted}; relative norm of the change, largest change:"))
        lines += [f"  {_change(p)}" for p in changed[: None if verbose else MOST]]
        if len(changed) > MOST and not verbose:
            lines.append(f"  ... and {len(changed) - MOST} more (-v shows all)")
    if "shape" in by_status:
        lines.append(line("shape", f"{fold([p.a for p in by_status['shape']])} differ in shape"))
    for label, names in (("only a", found.missing), ("only b", found.extra)):
        if names:
            lines.append(line(label, f"{len(names)}: {fold(names)}"))
    keys = list(found.config.items())
    for key, (one, two) in keys[: None if verbose else MOST]:
        lines.append(line("config", f"{show(key)}: {_value(one)} in a, {_value(two)} in b"))
    if len(keys) > MOST and not verbose:
        lines.append(line("", f"and {len(keys) - MOST} more keys (-v shows all)"))
    lines += [line("file", f"{show(name)} {what}") for name, what in found.side_files.items()]
    return [*lines, "equal" if found.is_empty else "different, exit 1"]


def _more(found: Sized, verbose: bool) -> str:
    count = len(found) - 1
    return f", and {count} more" if count > 0 and not verbose else ""


def _change(pair: Pair) -> str:
    odd = f", {pair.nonfinite} not finite on one side" if pair.nonfinite else ""
    if not (pair.largest or pair.nonfinite):
        odd = f", {pair.differing} equal in value and not in their bits (-0.0, or payloads of NaN)"
    name = show(pair.a) if pair.a == pair.b else f"{show(pair.a)} = {show(pair.b)}"
    return f"{pair.relative:9.2e} {pair.largest:9.2e}  {name}{odd}"


def _value(value: Any) -> str:
    return show(json.dumps(value, default=str), MAX_VALUE)


def to_json(found: Difference) -> dict[str, Any]:
    """The difference as data."""
    return {
        "equal": found.is_empty,
        "prefixes": list(found.prefixes),
        "read": [list(said) for said in found.said],
        "tied": list(found.tied),
        "lost": [list(lost) for lost in found.lost],
        "broken": [fault or None for fault in found.broken],
        "tensors": [
            {"a": p.a, "b": p.b, "status": p.status, "relative": _finite(p.relative), "largest": p.largest,
             "nonfinite": p.nonfinite, "differing": p.differing}
            for p in found.pairs
            if p.status != "equal"
        ],
        "equal_tensors": sum(p.status == "equal" for p in found.pairs),
        "dtypes": {n: list(v) for n, v in found.dtypes.items()},
        "missing": list(found.missing),
        "extra": list(found.extra),
        "config": {k: list(v) for k, v in found.config.items()},
        "side_files": dict(found.side_files),
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None
