"""Two outputs of one source: the merged model in OUT and the adapter in OUT-adapter.

Both are planned and refused, if need be, before either is written. Each appears whole or not at all; where a run ends
between them, the same command finds the model whole, compares it with the plan, and makes the adapter.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from converter.core.files.names import RECEIPT
from converter.errors import ConvertError, UsageError, VerificationFailed
from converter.publish.outputs import is_remote
from converter.recipe.options import Going, WriteOptions
from converter.recipe.verbs.conversion import SUFFIX, C, Conversion, memory_of, write_folder
from converter.text import show

if TYPE_CHECKING:
    from converter.core.writer.plan import Plan

MERGED, ADAPTER = "merged", "adapter"


class HalfWritten(ConvertError):
    """The adapter's error, told beside a model that is whole; exit code as that error's."""

    def __init__(self, error: ConvertError, model: str) -> None:
        told = (
            f"{error.what}. This is about the adapter: {show(model)} is whole, and the same command goes on from there"
        )
        super().__init__(error.code, told, where=error.where, expected=error.expected, got=error.got, next=error.next)
        self.exit_code = error.exit_code  # type: ignore[misc]


def expect_folders(out: str | None) -> None:
    """Two outputs go to two folders.

    Raises:
        UsageError: the output is on the Hub (`usage`).
    """
    if is_remote(out):
        what = "two outputs are two places"
        raise UsageError("usage", what, expected="--emit merged or --emit adapter, once for each place")


def convert_both(planned_of: Callable[[str], C], out: str | None, options: WriteOptions, going: Going) -> C:
    """Plan both, then write the model and the adapter; the adapter's result is the model's `adapter`.

    Args:
        planned_of: the result of `merged` or of `adapter`, planned.

    Raises:
        UsageError: see `expect_folders`.
        Refused: either can't be made, or its place is taken; nothing is written.
        HalfWritten: the adapter could not be written, and the model is whole.
    """
    expect_folders(out)
    memory_of(options)
    model, adapter = _halves(planned_of, out, options)
    both = dataclasses.replace(model, adapter=adapter)
    if going.on_plan is not None:
        going.on_plan(both)
    if out is not None:
        _preflight((model, adapter), options)
    if out is None or going.dry_run:
        return both
    if not model.earlier:
        both = dataclasses.replace(both, receipt=write_folder(model, going))
    try:
        receipt = write_folder(adapter, going)
    except ConvertError as error:
        raise HalfWritten(error, str(model.out)) from error
    return dataclasses.replace(both, adapter=dataclasses.replace(adapter, receipt=receipt))


def _halves(planned_of: Callable[[str], C], out: str | None, options: WriteOptions) -> tuple[C, C]:
    """Both outputs, planned; nothing is written.

    Raises:
        Refused: either can't be made, or its place is taken.
    """
    from converter.core.writer.preflight import check_target

    outs = (None, None) if out is None else (out, out.rstrip("/") + SUFFIX)
    if out is not None and all(os.path.lexists(Path(o).expanduser()) for o in outs if o):
        # Before any input is opened: nothing of an earlier run is to be finished.
        check_target(Path(out).expanduser(), (), overwrite=options.overwrite)
    model, adapter = (
        dataclasses.replace(planned_of(emit), out=place) for emit, place in zip((MERGED, ADAPTER), outs, strict=True)
    )
    if model.folder is None or adapter.folder is None or options.overwrite:
        return model, adapter
    there = [os.path.lexists(model.folder), os.path.lexists(adapter.folder)]
    is_done = there == [True, False] and _is_made_of(model.plan, model.folder)
    return dataclasses.replace(model, earlier=is_done), adapter


def _is_made_of(plan: Plan, folder: Path) -> bool:
    """True where a folder is what this plan would write: the receipt's words, every header, and sampled values."""
    from converter.core.files.reading import InputFiles
    from converter.core.writer.proof import check_written

    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        found = json.loads((folder / RECEIPT).read_bytes())
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


def _preflight(halves: tuple[Conversion, Conversion], options: WriteOptions) -> None:
    """Every refusal that can be made before the first byte, of either.

    Raises:
        Refused: see `check_target`, `check_space` and `memory_limit`.
    """
    from converter.core.writer.preflight import check_space, check_target, memory_limit
    from converter.core.writer.stage import Stage

    beside = 0
    for half in reversed(halves):
        if half.earlier or half.folder is None:
            continue
        stage = Stage(half.folder)
        if not os.path.lexists(stage.marker):
            check_target(half.folder, half.plan.inputs, overwrite=options.overwrite)
        memory_limit(half.plan, half.memory)
        check_space(half.plan, half.folder, already=stage.allocated(), beside=beside)
        beside += half.plan.total_bytes
