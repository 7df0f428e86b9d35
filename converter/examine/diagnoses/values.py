"""What only values show, under `--deep`: numbers that are none, zeros, heads that never learnt, merges of nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from converter.converters.heads.read import values
from converter.core.context import MAX_READ, Context
from converter.core.tensors.byte_runs import byte_runs, stored_parts
from converter.core.tensors.nodes import Cast, Concat, LazyTensor, Reshape, narrow, reshape
from converter.errors import ConvertError
from converter.examine.diagnoses.case import HERE, LOST, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.heads import heads_here
from converter.examine.diagnoses.places import heads_in
from converter.families.family import hidden_size
from converter.families.never_zero import LAYERS, may_be_norm, norms_that_differ
from converter.families.quantised.reading import read
from converter.families.words import OUTPUT_MODULES
from converter.sources.hf import peft
from converter.sources.hf import source as hf
from converter.sources.places import by_number
from converter.sources.survey import Survey
from converter.text import fold, show

_CHECKPOINT = re.compile(r"(?:checkpoint|step|epoch|iter)[-_]?\d+", re.ASCII)
_MASKS = re.compile(r"(?:mask|masked_bias|attn\.bias)$")
ODD_VALUES = "odd values"
"""Under this name a case keeps what `odd_values` found."""

_PARTS, _LEAST_ROWS = 8, 2
"""A matrix is looked at in so many stretches of rows, each of so many at least."""

_MOST_SIBLINGS = 2
_MIN_SAMPLE = 8


def stored(case: Case) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of the folder with values of its own; a training state's are stretches of its ranks' files."""
    for name, entry in case.survey.entries.items():
        if entry.info.numel:
            yield name, entry.tensor
    for file, found in case.survey.beside.items():
        yield from ((f"{file}:{n}", t) for n, t in found.tensors.items() if t.info.numel)


def odd_values(case: Case, context: Context) -> Mapping[str, tuple[int, int]]:
    """How many values of each tensor are not finite, and how many are huge; masks are, and are left out."""
    return case.once(ODD_VALUES, lambda c: dict(_odd_values(c, context)))


def _odd_values(case: Case, context: Context) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, tensor in stored(case):
        if _MASKS.search(name):
            continue
        try:
            if tensor.info.shape == () and not any(map(math.isnan, values(tensor, context))):
                continue  # a bound: minimum and maximum of an activation that is not clipped are infinite
            found = [context.odd(part) for part in stored_parts(tensor)]
        except ConvertError:
            continue
        context.heard(tensor.info.nbytes, name)
        yield name, (sum(bad for bad, _ in found), sum(above for _, above in found))


@diagnosis("nonfinite", "model", "adapter", "weights", "training", deep=True)
def nonfinite(case: Case, context: Context) -> Iterable[Finding]:
    """Tensors hold NaN or infinite values: sampling stops with `probability tensor contains either inf, nan or element
    < 0`, rewards are NaN. The run diverged, or a merge overflowed float16. They are never set to zero here: take an
    earlier checkpoint, or merge again in bfloat16.
    """
    counts = {name: bad for name, (bad, _) in odd_values(case, context).items() if bad}
    if counts:
        text = f"{sum(counts.values())} values in {len(counts)} tensors are NaN or infinite"
        worst = sorted(counts, key=lambda n: -counts[n])[:3]
        yield Finding(
            code="nonfinite",
            severity="error",
            text=text,
            tensors=tuple(counts),
            evidence=tuple(f"{show(n)}: {counts[n]}" for n in worst),
            recoverability=LOST,
        )


@diagnosis("zero-tensors", "model", "weights", deep=True)
def zero_tensors(case: Case, context: Context) -> Iterable[Finding]:
    """Whole matrices of a model are zero, heads apart, or an eighth of their rows or more in one stretch, or a norm is
    that is not zero in other layers: filled with zeros by a repair, or a save from a rank that did not hold them.
    (Biases, relative positions, buffers, and all LoRA's B at the start are zero by design; an embedding's rows of
    tokens that nobody has may be.)
    """
    heads = set(heads_here(case))
    found = _zero_parts(case, context)
    parts: dict[str, tuple[int, int]] = {}
    cut: list[str] = []
    for name, tensor in stored(case):
        is_matrix = len(tensor.info.shape) > 1 and min(tensor.info.shape) > 1 and LAYERS.search(name)
        if not is_matrix or not tensor.info.dtype.is_float or name in heads or ".lora_" in name:
            continue
        if is_zero(tensor, context):
            found.append(name)
        elif name.startswith(OUTPUT_MODULES) or "embed" in name:
            # Rows of tokens that nobody has are a few.
            cut += [name] if has_zero_part(tensor, context, least=tensor.info.numel // _PARTS) else []
        elif rows := _zero_rows(tensor, context):
            parts[name] = rows
        elif has_zero_part(tensor, context) or _has_zero_columns(tensor, context):
            cut.append(name)
    norms = _zero_norms(case, context)
    texts = {
        f"{len(cut)} matrices have a stretch of columns, or a rank's part, that is zero: {fold(cut)}": cut,
        f"{len(found)} matrices are zero everywhere: {fold(found)}": found,
        f"{len(norms)} norms are zero, and those at their place in other layers are not: {fold(norms)}": norms,
        f"{len(parts)} matrices have rows of zeros in one stretch: {fold(parts)}": list(parts),
    }
    for text, names in texts.items():
        if not names:
            continue
        stretches = tuple(f"{show(n)} rows {a} to {b - 1}" for n, (a, b) in list(parts.items())[:3] if n in names)
        yield Finding(
            code="zero-tensors",
            severity="changes-numbers",
            text=text,
            tensors=tuple(names),
            evidence=stretches or folded(case, names),
            recoverability=LOST,
        )


_NEVER_ZERO = frozenset(
    {
        *("weight", "qweight", "packed", "scale", "scales", "global", "absmax", "nested_absmax", "quant_map"),
        "nested_quant_map",
    }
)
"""Parts of a quantised weight by what each is: zero points, orders and layouts may be zero."""

_MAY_BE_ZERO = frozenset({"qzeros", "zero"})
"""Parts that are zero in every weight or in none."""


def _zero_parts(case: Case, context: Context) -> list[str]:
    """Codes, scales and tables of quantised weights that are zero everywhere: the weight is zero, or noise."""
    if not case.shapes or not case.config:
        return []
    weights = read(case.shapes, case.config).weights
    parts = {n for w, _ in weights for k, n in w.parts.items() if k in _NEVER_ZERO}
    floats = {n for n in parts if case.shapes[n].dtype.is_float and LAYERS.search(n)}  # matrices, looked at as others
    found = [n for n, tensor in stored(case) if n in parts - floats and context.is_zero(tensor)]
    zeros = {n for w, _ in weights for k, n in w.parts.items() if k in _MAY_BE_ZERO}
    silent = [n for n, tensor in stored(case) if n in zeros and is_zero(tensor, context)]
    return [*found, *(silent if len(silent) < len(zeros) else ())]


def _zero_norms(case: Case, context: Context) -> list[str]:
    """Weights of norms that are zero where others of the kind are not."""
    return norms_that_differ({n: is_zero(t, context) for n, t in stored(case) if may_be_norm(n, t.info)})


def is_zero(tensor: LazyTensor, context: Context) -> bool:
    """True where all that a tensor is made of is zero; what is computed need not be."""
    parts = list(stored_parts(tensor))
    return bool(parts) and all(map(context.is_zero, parts))


def _zero_rows(tensor: LazyTensor, context: Context) -> tuple[int, int] | None:
    """The first stretch of rows, in eighths of the matrix, that are zero; None where there is none."""
    rows = tensor.info.shape[0]
    height = max(_LEAST_ROWS, rows // _PARTS)
    count = rows // height
    if count < 2 or height * tensor.info.numel // rows < _LEAST_PART or byte_runs(tensor) is None:
        return None
    zero = [k for k in range(count) if context.is_zero(narrow(tensor, 0, k * height, height))]
    if not zero:
        return None
    last = next((k for k in range(zero[0], count) if k not in zero), count)
    return zero[0] * height, rows if last == count else last * height


_LEAST_PART = 16
"""Values of a rank's part, and of columns in the rows that are read: of fewer, zeros may be chance."""


def has_zero_part(tensor: LazyTensor, context: Context, *, least: int = _LEAST_PART) -> bool:
    """True where one of the ranks' parts that a tensor is made of is zero, and others are not.

    Args:
        least: so many values of a part at least.
    """
    parts = [p for p in stored_parts(tensor) if p.info.dtype.is_float]
    parts = parts if len(parts) > 1 else _pieces(tensor)
    parts = [p for p in parts if p.info.numel >= max(least, _LEAST_PART)]
    zero = [context.is_zero(p) for p in parts]
    return any(zero) and not all(zero)


def _pieces(tensor: LazyTensor) -> list[LazyTensor]:
    """What lies in several places of files, and reads as one."""
    while isinstance(tensor, Reshape | Cast):
        tensor = tensor.source
    parts = tensor.parts if isinstance(tensor, Concat) else ()
    return [p for p in parts if byte_runs(p) is not None]


def _has_zero_columns(tensor: LazyTensor, context: Context) -> bool:
    """True where an eighth of the columns or more, in one stretch, are zero in each of the rows that are read."""
    rows, columns = tensor.info.shape[0], tensor.info.numel // max(1, tensor.info.shape[0])
    width = columns // _PARTS
    read = sorted({round(k * (rows - 1) / (_PARTS - 1)) for k in range(_PARTS)})
    if not width or width * len(read) < _LEAST_PART:
        return False
    try:
        flat = reshape(tensor, (tensor.info.numel,))
        held = [values(narrow(flat, 0, row * columns, min(columns, MAX_READ // 8)), context) for row in read]
    except ConvertError:
        return False
    held = [row for row in held if any(row)]  # a row of zeros says nothing of columns
    if len(held) * width < _LEAST_PART or len(held) <= len(read) // 2:
        return False
    return any(not any(any(row[k * width : (k + 1) * width]) for row in held) for k in range(len(held[0]) // width))


def _head_weights(case: Case) -> dict[str, LazyTensor]:
    held = dict(stored(case))
    return {n: held[n] for n in heads_here(case) if n in held and n.endswith("weight")}


@diagnosis("head-untrained", "model", "adapter", deep=True)
def head_untrained(case: Case, context: Context) -> Iterable[Finding]:
    """The head's numbers look like those that it begins with: all zero, or a mean of nothing and the spread that
    transformers (initializer_range) or torch (1 / sqrt(3 h)) or OpenRLHF (1 / sqrt(h + 1)) draw. A head that was
    trained little looks the same, so this is a hint and no proof: compare it with an earlier checkpoint's.
    """
    for name, tensor in _head_weights(case).items():
        if tensor.info.nbytes > MAX_READ:
            continue
        try:
            numbers = values(tensor, context)
        except ConvertError:
            continue
        like = _like(numbers, case)
        if like:
            yield Finding(
                code="head-untrained",
                severity="cosmetic",
                text=f"{show(name)} looks untrained: {like}",
                tensors=(name,),
                evidence=folded(case, [name]),
            )


def _like(numbers: tuple[float, ...], case: Case) -> str:
    """What start the numbers look like; nothing where they look trained, or are too few to tell."""
    if not any(numbers):
        return "it is zero everywhere"
    count = len(numbers)
    if count < _MIN_SAMPLE or not all(map(math.isfinite, numbers)):
        return ""
    mean = math.fsum(numbers) / count
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in numbers) / count)
    width = hidden_size(case.config) or count
    given = case.config.get("initializer_range", 0.02)
    starts = {"initializer_range": given if isinstance(given, int | float) else 0.02,
              "torch's Linear": 1 / math.sqrt(3 * width), "OpenRLHF's": 1 / math.sqrt(width + 1)}  # fmt: skip
    # Two standard errors of a standard deviation, 1 / sqrt(2 n) each.
    margin = 2 / math.sqrt(2 * count)
    for word, start in starts.items():
        if start > 0 and abs(spread / start - 1) < margin and abs(mean) < 3 * start / math.sqrt(count):
            return f"its spread of {spread:.3g} is that of a start ({word}: {start:.3g})"
    return ""


@diagnosis("head-unmoved", "model", "adapter", deep=True)
def head_unmoved(case: Case, context: Context) -> Iterable[Finding]:
    """The head is the same, bit by bit, in another checkpoint of the run: it was saved and never trained, as in
    LLaMA-Factory's full reward models under ZeRO-3. Its scores are those of a random head.
    """
    own = _head_weights(case)
    if not own or not _CHECKPOINT.fullmatch(case.root.resolve().name):
        return
    for sibling in _siblings(case.root.resolve()):
        other = _heads_of(sibling, case.kind)
        shared = [n for n in own if n in other and other[n].info == own[n].info]
        if shared and all(context.equal(own[n], other[n]) for n in shared):
            text = f"{fold(shared)} is bit-equal in {show(sibling.name)}: the head did not move in training"
            yield Finding(
                code="head-unmoved",
                severity="changes-numbers",
                text=text,
                tensors=tuple(shared),
                evidence=(show(sibling.name),),
                recoverability=LOST,
            )
            return


def _siblings(root: Path) -> list[Path]:
    """The nearest checkpoints of the run, by their numbers."""
    try:
        beside = [p for p in root.parent.iterdir() if p != root and _CHECKPOINT.fullmatch(p.name) and p.is_dir()]
    except OSError:
        return []
    own = by_number(root)[0]
    return sorted(beside, key=lambda p: abs(by_number(p)[0][-1] - own[-1]))[:_MOST_SIBLINGS]


def _heads_of(folder: Path, kind: str) -> Mapping[str, LazyTensor]:
    survey: Survey = (peft if kind == "adapter" else hf).SOURCE.survey(folder)
    inside = {n: e.tensor for n, e in survey.entries.items()}
    beside = {f"{file}:{n}": t for file, f in survey.beside.items() for n, t in f.tensors.items()}
    return {n: t for n, t in {**inside, **beside}.items() if n in heads_in(survey)}


@diagnosis("merged-equals-base", "model", deep=True)
def merged_equals_base(case: Case, context: Context) -> Iterable[Finding]:
    """Every matrix is the base model's, bit by bit: a merge that changed nothing. verl's merger writes the base and
    leaves the adapter beside it; an alpha of 0, a lora_B of zeros and keys that nothing matched do the same. (A reward
    model whose backbone was frozen has the base's backbone by design.)
    """
    base = case.base
    if base is None or base.root.resolve() == case.root.resolve():
        return
    theirs = {n: e.tensor for n, e in base.survey.entries.items()}
    shared = [(t, theirs[n]) for n, t in stored(case) if n in theirs and len(t.info.shape) > 1]
    if not shared or any(a.info != b.info for a, b in shared):
        return
    if all(context.equal(a, b) for a, b in shared):
        has_head = bool(heads_here(case))
        text = f"all {len(shared)} matrices equal those of {show(base.asked)}" + (
            "; only the head differs" if has_head else ": the merge changed nothing"
        )
        yield Finding(
            code="merged-equals-base",
            severity="cosmetic" if has_head else "changes-numbers",
            text=text,
            recoverability=HERE,
        )
