"""Adam's moments of a training state, under `--deep`: NaN, zeros, and steps that are not the weights'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.core.context import Context
from converter.core.tensors.byte_runs import stored_parts
from converter.errors import ConvertError
from converter.examine.diagnoses.case import LOST, Case, Finding, diagnosis
from converter.examine.diagnoses.values import is_zero
from converter.sources.finding import find_place, kind_of
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.core.tensors.nodes import LazyTensor

_KINDS: tuple[Literal["exp_avg", "exp_avg_sq"], ...] = ("exp_avg", "exp_avg_sq")


def _moments(case: Case) -> dict[str, Mapping[str, LazyTensor]]:
    """Both moments by parameter; nothing where a trainer's are not read, or are not all there."""
    from converter.sources.moments import adam_moments

    try:
        return {kind: adam_moments(case.root, which=kind) for kind in _KINDS}
    except ConvertError:
        return {}


_DAMAGE = frozenset({"file-truncated", "torch-zip", "torch-not", "pickle-malformed", "dcp-file-missing",
                     "dcp-metadata-missing", "dcp-rank-metadata", "dcp-malformed", "dcp-record", "dcp-chunks",
                     "fsdp-rank-files", "verl-rank-missing", "verl-mixed", "verl-sizes", "verl-malformed",
                     "zero-rank-missing", "zero-mixed", "zero-sizes", "zero-malformed",
                     "zero-parameter-missing"})  # fmt: skip
"""Codes of files that are not what was saved; others name an optimizer that isn't Adam, or that nobody reads."""


@diagnosis("optimizer-damaged", "training")
def optimizer_damaged(case: Case, context: Context) -> Iterable[Finding]:
    """The weights are whole, and the optimizer's state that was saved with them is not: files of it are missing, cut
    short, of another rank or of another step. `gather` gives the weights, bit by bit; whoever resumes fails, or goes on
    with moments that never were.
    """
    if any(f.severity == "error" for f in case.survey.faults):
        return
    try:
        expect_optimizer(case.root)
    except ConvertError as why:
        yield Finding(
            code="optimizer-damaged",
            severity="changes-numbers",
            text=f"the weights are whole, and the optimizer's state is not: {why.what}",
            evidence=(why.code, *((why.where,) if why.where else ())),
            recoverability=LOST,
            next=why.next,
        )


def expect_optimizer(folder: Path) -> None:
    """Read what places both moments have in the files of a training state.

    Raises:
        ConvertError: files are missing, cut short or mixed; not that there is no optimizer, or one that isn't read.
    """
    from converter.sources.moments import adam_moments

    try:
        place = find_place(folder, str(folder))
        if kind_of(place.folder) == "deepspeed":
            from converter.sources.deepspeed.whole import expect_moments

            expect_moments(place.folder)
            return
        for kind in _KINDS:
            adam_moments(folder, which=kind)
    except ConvertError as why:
        if why.code in _DAMAGE:
            raise


@diagnosis("moments-nonfinite", "training", deep=True)
def moments_nonfinite(case: Case, context: Context) -> Iterable[Finding]:
    """Adam's moments hold NaN or infinite values: the next step makes the weights NaN, whatever they are now. The run
    had diverged when it was saved. Go on from an earlier checkpoint, or from these weights with a new optimizer.
    """
    counts: dict[str, int] = {}
    for kind, held in _moments(case).items():
        for name, tensor in held.items():
            try:
                count = sum(map(context.nonfinite, stored_parts(tensor)))
            except ConvertError:
                continue
            if count:
                counts[f"{kind} of {name}"] = count
    if counts:
        worst = sorted(counts, key=lambda n: -counts[n])[:3]
        yield Finding(
            code="moments-nonfinite",
            severity="error",
            text=f"{sum(counts.values())} values in {len(counts)} of Adam's moments are NaN or infinite",
            evidence=tuple(f"{show(n)}: {counts[n]}" for n in worst),
            recoverability=LOST,
        )


@diagnosis("moments-zero", "training", deep=True)
def moments_zero(case: Case, context: Context) -> Iterable[Finding]:
    """Adam's second moments are zero after the first step: those parameters never got a gradient. Where all are zero,
    the optimizer began anew, or its states were lost and filled with zeros: the first steps will be far too large.
    """
    held = _moments(case).get("exp_avg_sq", {})
    steps = _steps(case)
    zero = [n for n, t in held.items() if t.info.numel and is_zero(t, context)]
    if not zero or (steps is not None and steps[0] < 1):
        return
    is_all = len(zero) == len(held)
    yield Finding(
        code="moments-zero",
        severity="changes-numbers" if is_all else "cosmetic",
        text=f"{'all' if is_all else ''} {len(zero)} of {len(held)} second moments of Adam are zero".strip(),
        tensors=tuple(zero),
        evidence=(fold(zero),),
        recoverability=LOST if is_all else "",
    )


@diagnosis("moments-older", "training")
def moments_older(case: Case, context: Context) -> Iterable[Finding]:
    """Adam has counted fewer steps than the run: its moments are older than the weights, or it began anew when the run
    was resumed without its states. Training goes on from there with other steps than an uninterrupted run's.
    """
    steps = _steps(case)
    if steps is None or steps[0] >= steps[1]:
        return
    yield Finding(
        code="moments-older",
        severity="changes-numbers",
        text=f"Adam has counted {steps[0]:g} steps, and the run {steps[1]:g}",
    )


def _steps(case: Case) -> tuple[float, float] | None:
    """Adam's steps, and the run's without those that were skipped; None where a trainer doesn't record both."""
    try:
        place = find_place(case.root, case.asked)
        if kind_of(place.folder) not in ("deepspeed", "deepspeed_universal"):
            return None
        from converter.sources.deepspeed.agreement import counted_steps
        from converter.sources.deepspeed.state import read_shards

        return counted_steps(read_shards(place.folder))
    except ConvertError:
        return None
