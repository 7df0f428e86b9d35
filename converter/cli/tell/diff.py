"""`rlhf-convert diff`: two checkpoints by value."""

from __future__ import annotations

import json
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from converter.cli.lines import line
from converter.cli.progress import progress
from converter.cli.report.asked import expect_report
from converter.cli.report.writing import write_report
from converter.recipe.verbs import diff as verb
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.cli.options import Display
    from converter.examine.diff import Difference, Pair

MOST = 8
"""Lines of changed tensors that the screen shows without `-v`."""

MAX_VALUE = 60


def diff(a: str, b: str, options: Display, *, report_to: str | None = None, **knobs: Any) -> int:
    """Compare; exit code 0 where all is equal, else 1."""
    expect_report(report_to)
    with progress(options.sink) as reporter:
        done = verb.diff(a, b, reporter=reporter, **knobs)
    found = done.difference
    options.sink.screen(
        [
            line("a", f"{show(a)}  {done.a.origin.kind}, {len(done.a)} tensors"),
            line("b", f"{show(b)}  {done.b.origin.kind}, {len(done.b)} tensors"),
            *screen(found, verbose=options.verbose),
        ]
    )
    options.sink.json(to_json(found))
    if report_to is not None:
        from converter.cli.report.of_reading import grid_of_diff, page_of_diff

        write_report(report_to, options.sink, lambda: page_of_diff(done), lambda: grid_of_diff(done))
    return 0 if done.is_equal else 1


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
