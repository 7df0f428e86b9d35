"""`rlhf-convert gather --emit both`: the merged model in OUT and the adapter in OUT-adapter.

Both are planned and refused, if need be, before either is written. Each appears whole or not at all; where a run ends
between them, the same command finds the model whole, compares it with the plan, and makes the adapter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.options import Conversion
from converter.cli.run.planned import Written, load_commands, missing_output, notes_json, write_prepared
from converter.diagnostic import Next
from converter.errors import ConvertError, UsageError, VerificationFailed
from converter.publish.outputs import goes_to_hub
from converter.recipe.verbs.pieces import threads
from converter.text import parse_size, show

if TYPE_CHECKING:
    from converter.core.writer.plan import Plan
    from converter.recipe.recipe import Recipe
    from converter.recipe.run import Prepared

MERGED, ADAPTER = "merged", "adapter"
SUFFIX = "-adapter"


class _HalfWritten(ConvertError):
    """The adapter's error, told beside a model that is whole; exit code as that error's."""

    def __init__(self, error: ConvertError, model: str) -> None:
        told = (
            f"{error.what}. This is about the adapter: {show(model)} is whole, and the same command goes on from there"
        )
        super().__init__(error.code, told, where=error.where, expected=error.expected, got=error.got, next=error.next)
        self.exit_code = error.exit_code  # type: ignore[misc]


@dataclass(frozen=True)
class _Half:
    """One of the two outputs.

    Attributes:
        done: an earlier run published it, and it is what this one would write.
    """

    prepared: Prepared
    out: str | None
    done: bool = False

    @property
    def target(self) -> Path:
        """Where it goes."""
        assert self.out is not None
        return Path(self.out).expanduser()


@dataclass(frozen=True)
class Split:
    """What is split in two.

    Attributes:
        recipe: of `merged` or of `adapter`, and how the source was chosen, in words.
        input_lines: the screen's lines about the source.
        next_commands: what to type after the adapter is written.
    """

    recipe: Callable[[str], tuple[Recipe, str]]
    input_lines: Callable[[Prepared, str], list[str]]
    next_commands: Callable[[Written], Sequence[Next]]


def write_both(split: Split, out: str | None, options: Conversion) -> int:
    """Plan both, show both, then write the model and the adapter."""
    if options.print_recipe:
        what = "two outputs are two recipes"
        raise UsageError("usage", what, expected="--print-recipe with --emit merged, or with --emit adapter")
    if out is None and not options.dry_run:
        raise missing_output()
    if goes_to_hub(out) or options.push_to_hub is not None:
        what = "two outputs are two repositories"
        raise UsageError("usage", what, expected="--emit merged or --emit adapter, once for each repository")
    memory = None if options.memory is None else parse_size(options.memory, what="--memory")
    begun = time.monotonic()
    model, adapter, said = _halves(split, out, options)
    _show_plans(model, adapter, split.input_lines(model.prepared, said), options)
    if out is not None:
        _preflight((model, adapter), memory, options)
    if options.dry_run:
        options.sink.screen(["dry run: nothing written"])
        planned = {h: {"out": x.out, **_counts(x.prepared)} for h, x in ((MERGED, model), (ADAPTER, adapter))}
        options.sink.json({"dry_run": True, **planned, "notes": _notes(model, adapter)})
        return 0
    receipts = [_written(model, memory, options)]
    try:
        receipts.append(_written(adapter, memory, options))
    except ConvertError as error:
        raise _HalfWritten(error, str(model.out)) from error
    _finish((model, adapter), receipts, split, time.monotonic() - begun, options)
    return 0


def _halves(split: Split, out: str | None, options: Conversion) -> tuple[_Half, _Half, str]:
    """Both outputs, planned, and how the tag was chosen; nothing is written.

    Raises:
        Refused: either can't be made, or its place is taken.
    """
    from converter.core.writer.preflight import check_target
    from converter.recipe.run import prepare

    outs = (None, None) if out is None else (out, out.rstrip("/") + SUFFIX)
    if out is not None and all(os.path.lexists(Path(o).expanduser()) for o in outs if o):
        # Before any input is opened: nothing of an earlier run is to be finished.
        check_target(Path(out).expanduser(), (), overwrite=options.overwrite)
    halves, said = [], ""
    for emit, target in zip((MERGED, ADAPTER), outs, strict=True):
        recipe, said = split.recipe(emit)
        allow = frozenset(options.allow or ())
        prepared = prepare(recipe, allow=allow, token=options.token, keep_code=options.keep_code)
        halves.append(_Half(prepared, target))
    model, adapter = halves
    if out is None or options.overwrite:
        return model, adapter, said
    there = [os.path.lexists(h.target) for h in (model, adapter)]
    is_done = there == [True, False] and _is_made_of(model.prepared.plan, model.target)
    return dataclasses.replace(model, done=is_done), adapter, said


def _is_made_of(plan: Plan, folder: Path) -> bool:
    """True where a folder is what this plan would write: the receipt's words, every header, and sampled values."""
    from converter.core.files.links import RECEIPT_FILE
    from converter.core.files.reading import InputFiles
    from converter.core.writer.proof import check_written

    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        found = json.loads((folder / RECEIPT_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    promised = {**plan.provenance, "counts": plan.counts, "dropped": dict(plan.dropped)}
    if not isinstance(found, dict) or {k: found.get(k) for k in promised} != json.loads(json.dumps(promised)):
        return False
    try:
        with InputFiles(plan.inputs) as files:
            check_written(plan, folder, files)
    except (VerificationFailed, OSError):
        return False
    return True


def _show_plans(model: _Half, adapter: _Half, shown: list[str], options: Conversion) -> None:
    from converter.cli import lines as report
    from converter.core.writer import preflight

    sink = options.sink
    sink.screen(shown)
    notes = [*model.prepared.context.notes, *adapter.prepared.context.notes]
    sink.screen(report.note_lines(dict.fromkeys(notes), verbose=options.verbose))
    for word, half in (("model", model), ("adapter", adapter)):
        sink.screen([report.line(word, show(half.out or "OUT is not named"))])
        if half.done:
            sink.screen([report.line("", "whole already: an earlier run made it, and it was compared with the plan")])
        else:
            sink.screen([report.plan_line(half.prepared.plan, half.prepared.checkpoint, [])])
    todo = [h for h in (model, adapter) if not h.done]
    free = preflight.free_bytes(model.target) if model.out else None
    jobs = options.jobs or threads()
    needed = max(preflight.needed_memory(h.prepared.plan, jobs) for h in todo)
    sink.screen([report.needs_line(sum(h.prepared.plan.total_bytes for h in todo), free, needed)])


def _preflight(halves: tuple[_Half, _Half], memory: int | None, options: Conversion) -> None:
    """Every refusal that can be made before the first byte, of either.

    Raises:
        Refused: see `check_target`, `check_space` and `memory_limit`.
    """
    from converter.core.writer.preflight import check_space, check_target, memory_limit
    from converter.core.writer.stage import Stage

    beside = 0
    for half in reversed(halves):
        if half.done:
            continue
        plan, stage = half.prepared.plan, Stage(half.target)
        if not os.path.lexists(stage.marker):
            check_target(half.target, plan.inputs, overwrite=options.overwrite)
        memory_limit(plan, memory)
        check_space(plan, half.target, already=stage.allocated(), beside=beside)
        beside += plan.total_bytes


def _written(half: _Half, memory: int | None, options: Conversion) -> Written | None:
    """The output, written; None where it was there."""
    if half.done:
        return None
    assert half.out is not None
    receipt = write_prepared(half.prepared, half.target, options.jobs or threads(), memory, options)
    return Written(half.prepared, receipt, half.out)


def _finish(
    halves: tuple[_Half, _Half],
    written: list[Written | None],
    split: Split,
    seconds: float,
    options: Conversion,
) -> None:
    """The screen's last lines for both, and what to type next."""
    from converter.cli import lines as report
    from converter.core.files.links import RECEIPT_FILE

    commands: list[Next] = []
    values: list[dict[str, Any]] = []
    for half, each in zip(halves, written, strict=True):
        if each is None:
            options.sink.screen(
                [report.wrote_line(str(half.out), half.prepared.checkpoint.config, None) + " (earlier)"]
            )
            content = json.loads((half.target / RECEIPT_FILE).read_bytes())
        else:
            options.sink.screen(each.screen(verbose=options.verbose))
            commands += load_commands(each) if half is halves[0] else split.next_commands(each)[:1]
            content = dict(each.receipt.content)
        values.append({"out": half.out, "receipt": content, "earlier": each is None})
    options.sink.screen(report.next_lines(commands))
    model, adapter = values
    more = {"notes": _notes(*halves), "seconds": round(seconds, 3), "next": list(map(str, commands))}
    options.sink.json({**model, "adapter": adapter, **more})


def _counts(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    from converter.cli.lines import files_json

    files = files_json(plan)
    return {"counts": plan.counts, "total_bytes": plan.total_bytes, "fingerprint": plan.fingerprint, "files": files}


def _notes(*halves: _Half) -> list[dict[str, str]]:
    found = [n for h in halves for n in notes_json(h.prepared)]
    return [n for i, n in enumerate(found) if n not in found[:i]]
