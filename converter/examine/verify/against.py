"""One folder against another: the same backbone tensor by tensor, the same head as a function, the same rewards.

Tensors are streamed in blocks, so that memory doesn't grow with the model. Two are the same where their bits are; else
where one is the other rounded once to its dtype. The head is compared as a function of hidden states, since dialects
write one head in several ways (a bias folded into a mean, a linear layer inside an MLP).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from converter.converters.heads.model import Reading
from converter.core.compute.evaluate import Evaluator, torch_dtype
from converter.core.context import Context
from converter.core.files.reading import InputFiles
from converter.core.tensors.byte_runs import byte_runs
from converter.core.tensors.nodes import LazyTensor, narrow
from converter.core.writer.reporter import Reporter, Silent
from converter.dialects.known import Target
from converter.errors import ConvertError
from converter.examine.verify.check import Check, fails, holds, note, spread
from converter.examine.verify.values import Reference, apply_head, fp64, is_small, probe_batches, reading_inputs
from converter.families.family import hidden_size
from converter.families.words import OUTPUT_PREFIXES
from converter.text import fold

BLOCK = 1 << 22
"""Elements of a tensor that are held while it is compared: 32 MB a side in fp64."""

ULPS = 4
"""Steps of the coarser dtype, at the size of a tensor's largest value, by which two ways of summing may differ."""

PROBES = 64
"""Random hidden states on which two heads are compared."""

ROUNDED = 2**-8
"""Largest difference of scores, relative to the largest, that rounding a head to bf16 gives."""

EXACT = 1e-9
"""Largest difference of fp64 values that equal bits may give, relative to the largest: other orders of summing."""


@dataclass
class Compared:
    """How tensors of one name compare: names by outcome, and the largest difference of those that differ."""

    equal: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    near: dict[str, float] = field(default_factory=dict)
    differ: dict[str, float] = field(default_factory=dict)
    longer: list[str] = field(default_factory=list)
    only_here: list[str] = field(default_factory=list)
    only_there: list[str] = field(default_factory=list)

    @property
    def is_rounded(self) -> bool:
        """True where rounding to another dtype is all the difference."""
        return bool(self.rounded) and not (self.near or self.differ or self.longer or self.only_here or self.only_there)


def check_against(
    here: Reading, there: Reading, target: Target, compared: Compared, *, fresh: bool = False, whole: bool = False
) -> list[Check]:
    """Everything that two readings can be compared in; `here` is the folder, `there` what it was made of.

    Args:
        compared: their backbones, compared.
        fresh: the folder's head was made with it, so that the source has none.
        whole: the head was compared with the rest, tensor by tensor.
    """
    checks = [*_backbone(compared, target)]
    if whole or target.role == "actor":
        return checks
    if fresh:
        return [
            *checks,
            note("head", "head-fresh", "the receipt says that the head is a fresh one: the source has none"),
        ]
    head_checks, shift = _heads(here, there)
    checks += head_checks
    if here.head is not None and there.head is not None:
        checks += _values(here, there, target, compared, shift)
    return checks


# Backbone


def compare_backbones(
    here: Reading, there: Reading, context: Context, *, outputs: bool = False, reporter: Reporter | None = None
) -> Compared:
    """Tensors of one canonical name, streamed.

    Args:
        outputs: an output embedding that only one side has counts too, where it is not tied.
        reporter: hears of each tensor that was compared.
    """
    told = reporter or Silent()
    told.start(sum(x.info.nbytes for x in here.checkpoint.tensors.values()), 0)
    found = Compared()
    ours, theirs = here.checkpoint.tensors, there.checkpoint.tensors
    passed = () if outputs and not here.family.tied else OUTPUT_PREFIXES
    found.only_here = [n for n in ours if n not in theirs and not n.startswith(passed)]
    found.only_there = [n for n in theirs if n not in ours and not n.startswith(passed)]
    inputs = {**reading_inputs(here), **reading_inputs(there)}
    with InputFiles(inputs) as files:
        for name in ours:
            if name in theirs:
                _compare(name, ours[name], theirs[name], found, context, files)
            told.advance(ours[name].info.nbytes, name)
    return found


def _compare(name: str, a: LazyTensor, b: LazyTensor, found: Compared, context: Context, files: InputFiles) -> None:
    """Bits first, without torch; else blocks of values."""
    shape, other = a.info.shape, b.info.shape
    if shape != other:
        if len(shape) != 2 or shape[1:] != other[1:] or shape[0] < other[0]:
            found.differ[name] = float("inf")
            return
        found.longer.append(name)
        a = narrow(a, 0, 0, other[0])
    if a.info == b.info and byte_runs(a) is not None and byte_runs(b) is not None and context.equal(a, b):
        found.equal.append(name)
        return
    outcome, largest = _by_value(a, b, files)
    if outcome == "equal":
        found.equal.append(name)
    elif outcome == "rounded":
        found.rounded.append(name)
    elif outcome == "near":
        found.near[name] = largest
    else:
        found.differ[name] = largest


def blocks(x: LazyTensor) -> Iterator[LazyTensor]:
    """Rows of a tensor, in order, some `BLOCK` elements at a time."""
    rows = x.info.shape[0] if x.info.shape else 0
    if rows < 2:
        yield x
        return
    step = max(1, BLOCK // max(1, x.info.numel // rows))
    for start in range(0, rows, step):
        yield narrow(x, 0, start, min(step, rows - start))


def _by_value(a: LazyTensor, b: LazyTensor, files: InputFiles) -> tuple[str, float]:
    """How two tensors compare, and by how much they differ at most.

    `equal`; `rounded`: one side is the other, rounded once to nearest even; `near`: within `ULPS` steps, as two orders
    of summing give; `differ`.
    """
    import torch

    whole = Evaluator(files)
    same, rounded, largest, size = True, True, 0.0, 0.0
    for mine, other in zip(blocks(a), blocks(b), strict=True):
        x, y = whole.evaluate(mine, {}), whole.evaluate(other, {})
        wide_x, wide_y = x.to(torch.float64), y.to(torch.float64)
        size = max(size, float(wide_y.abs().max()) if wide_y.numel() else 0.0)
        if not torch.equal(wide_x, wide_y):
            same = False
            rounded = rounded and (torch.equal(y.to(x.dtype), x) or torch.equal(x.to(y.dtype), y))
            largest = max(largest, float((wide_x - wide_y).abs().max()))
    if same or rounded:
        return ("equal" if same else "rounded"), largest
    return ("near" if largest <= ULPS * _step(a, b) * size else "differ"), largest


def _step(a: LazyTensor, b: LazyTensor) -> float:
    """The relative distance of neighbours in the coarser of two float dtypes; 0 where one isn't a float."""
    import torch

    dtypes = [torch_dtype(x.info.dtype) for x in (a, b)]
    return max(torch.finfo(d).eps for d in dtypes) if all(d.is_floating_point for d in dtypes) else 0.0


def _backbone(found: Compared, target: Target) -> list[Check]:
    checks: list[Check] = []
    total = len(found.equal) + len(found.rounded) + len(found.near) + len(found.differ)
    if found.only_there:
        text = f"{len(found.only_there)} tensors of the source are not here: {fold(found.only_there)}"
        checks.append(fails("against", "tensors-lost", text))
    if found.only_here:
        text = f"{len(found.only_here)} tensors are not in the source: {fold(found.only_here)}"
        checks.append(fails("against", "tensors-added", text))
    if found.differ:
        worst = max(found.differ, key=lambda n: found.differ[n])
        by = "another shape" if found.differ[worst] == float("inf") else f"up to {found.differ[worst]:.3g}"
        text = f"{len(found.differ)} of {total} tensors differ, {by} ({fold([worst])}): {fold(found.differ)}"
        checks.append(fails("against", "tensors-differ", text))
    if found.longer:
        checks.append(
            note("against", "rows-added", f"rows were added to {fold(found.longer)}; the source's are the same")
        )
    if not checks or all(c.outcome == "note" for c in checks):
        words = f"{len(found.equal)} of {total} backbone tensors bit-equal"
        if found.rounded:
            words += f", {len(found.rounded)} rounded once to another dtype"
        if found.near:
            words += f", {len(found.near)} within rounding ({max(found.near.values()):.2g} at most)"
        checks.insert(0, holds("against", words))
    return checks


# Head


def _heads(here: Reading, there: Reading) -> tuple[list[Check], float | None]:
    """The heads on the same random hidden states; and the shift between them where that is all the difference."""
    import torch

    if here.head is None or there.head is None:
        side = "this folder" if here.head is None else "the source"
        return [
            fails("head", "head-absent", f"{side} has no head, so that nothing was compared with the other's")
        ], None
    hidden = hidden_size(here.checkpoint.config) or 0
    states = torch.randn(PROBES, hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with InputFiles({**reading_inputs(here), **reading_inputs(there)}) as files:
        evaluator = Evaluator(files)
        ours = apply_head(fp64(here.head, evaluator), here.normaliser, states)
        theirs = apply_head(fp64(there.head, evaluator), there.normaliser, states)
    if ours.shape != theirs.shape:
        return [_judge_rows(ours, theirs)], None
    return _judge_heads(ours.reshape(-1), theirs.reshape(-1))


def _judge_rows(ours: Any, theirs: Any) -> Check:
    """A head with another number of rows: holds where it is rows of the source's, or fixed sums of them."""
    import torch

    text = f"the head gives {ours.shape[-1]} values a token, the source's {theirs.shape[-1]}"
    ones = torch.ones(len(theirs), 1, dtype=theirs.dtype)
    weights = torch.linalg.lstsq(torch.cat([theirs, ones], -1), ours).solution
    rest = float((torch.cat([theirs, ones], -1) @ weights - ours).abs().max())
    is_determined = theirs.shape[-1] + 1 < len(theirs) // 2
    if not is_determined or rest > ROUNDED * (float(ours.abs().max()) or 1.0):
        return fails("head", "head-rows", f"{text}, and it is not a sum of those")
    if abs(float(weights[-1].abs().max())) > ROUNDED * (float(ours.abs().max()) or 1.0):
        return fails("head", "head-shifted", f"{text}; it is a sum of those, and a constant")
    shown = "; ".join(", ".join(f"{w:.4g}" for w in column) for column in weights[:-1].T.tolist())
    return holds("head", f"{text}: a sum of those, with weights {shown}")


def _judge_heads(ours: Any, theirs: Any) -> tuple[list[Check], float | None]:
    """Equal, rounded, shifted, scaled, or another head."""
    difference = ours - theirs
    size = float(theirs.abs().max()) or 1.0
    largest = float(difference.abs().max())
    if largest <= EXACT * size:
        return [holds("head", "the same function of hidden states")], 0.0
    shift = float(difference.mean())
    if float((difference - shift).abs().max()) <= EXACT * size:
        text = f"scores shift by {shift:.6g} everywhere (a bias or mean was left out); their order is kept"
        return [fails("head", "head-shifted", text)], shift
    scale = float(((ours - ours.mean()) * (theirs - theirs.mean())).sum() / ((theirs - theirs.mean()) ** 2).sum())
    offset = float((ours - scale * theirs).mean())
    rest = float((ours - scale * theirs - offset).abs().max())
    if rest <= 1e-6 * size and abs(scale - 1) > 1e-3:
        text = (
            f"scores are {scale:.6g} times the source's{f' and shift by {offset:.6g}' if abs(offset) > EXACT else ''}"
        )
        return [fails("head", "head-scaled", f"{text}: a normalisation was left out or applied twice")], None
    if largest <= ROUNDED * size:
        text = f"the same head, rounded: scores of random states differ by {largest / size:.2g} of their size"
        return [note("head", "head-rounded", text)], None
    return [fails("head", "head-differs", f"another head: scores of random states differ by {largest:.3g}")], None


# Values


def _values(here: Reading, there: Reading, target: Target, compared: Compared, shift: float | None) -> list[Check]:
    if not (is_small(here) and is_small(there)):
        return [note("values", "not-run", "too large to run here: compared tensor by tensor, and the head on its own")]
    try:
        ours, theirs = Reference(here), Reference(there)
    except ConvertError as error:
        return [note("values", error.code, f"not run: {error.what}")]
    batches = probe_batches(here.checkpoint.config)
    pad = here.checkpoint.config.get("pad_token_id")
    largest, said = 0.0, []
    for batch in batches.values():
        if target.role == "critic":
            on = batch.attention_mask
            a = [
                v
                for row, m in zip(ours.values(batch).tolist(), on, strict=True)
                for v, k in zip(row, m, strict=True)
                if k
            ]
            b = [
                v
                for row, m in zip(theirs.values(batch).tolist(), on, strict=True)
                for v, k in zip(row, m, strict=True)
                if k
            ]
        else:
            a = ours.rewards(batch, target.dialect.pooling, pad).tolist()
            b = theirs.rewards(batch, there.dialect.pooling, there.checkpoint.config.get("pad_token_id")).tolist()
        largest = max(largest, *(abs(x - y) for x, y in zip(a, b, strict=True)))
        said += b
    width = spread(said) or max(map(abs, said), default=1.0) or 1.0
    what = "values" if target.role == "critic" else "rewards"
    sides = " and ".join(f"{name}-padded" for name in batches)
    text = f"{len(said)} {what} on {sides} batches differ by {largest:.3g} at most, of a spread of {width:.3g}"
    exact = not (compared.differ or compared.rounded or compared.near) and shift == 0.0
    if exact and largest > EXACT * max(width, 1.0):
        return [fails("values", "values-differ", text)]
    if compared.differ and largest > 1e-3 * width:
        return [fails("values", "values-differ", f"{text}; the base differs")]
    return [holds("values", text)]
