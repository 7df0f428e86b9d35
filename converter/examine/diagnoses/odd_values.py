"""Matrices whose values no training makes, under `--deep`: one number everywhere, or far off their siblings' scale."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

from converter.converters.heads.read import values
from converter.core.context import Context
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor, narrow, reshape
from converter.errors import ConvertError
from converter.examine.diagnoses.case import LOST, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.heads import heads_here
from converter.examine.diagnoses.values import has_zero_part, is_zero, odd_values
from converter.families.factors import factor_in_name
from converter.families.never_zero import LAYERS
from converter.families.words import INPUT, LORA_PAIR, OUTPUT
from converter.text import fold, show

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)
_PLAIN = (DType.F32, DType.F16, DType.BF16)
_STRETCHES, _LENGTH = 4, 1024
"""So many stretches of so many values are read of a matrix: enough for its scale, and 70B are looked at in seconds."""
_IS_LEARNT = re.compile(r"(?:^|[._])(?:weight|bias|proj|w[123]|scales?|scale_inv|absmax|SCB)$|\.lora_", re.ASCII)
"""Names of what is trained, and of the scales of what was quantised; buffers may hold any number."""

_OFF = 1000.0
"""Between layers, matrices of one position differ by less than 100 in every model that was looked at."""
_LEAST_SIBLINGS = 2
_PRUNED = ("lora_E",)
"""Factors that training itself sets to zero in some modules: AdaLoRA takes their rank away."""


@diagnosis("suspicious-values", "model", "weights", "adapter", "training", deep=True)
def suspicious_values(case: Case, context: Context) -> Iterable[Finding]:
    """A matrix holds one number everywhere, or its values are a thousand times as large as those of the matrices at its
    place in other layers: overwritten, scaled twice by a merge (alpha over r on top of itself), or read in another
    dtype than it was written in. A thousand times smaller is a hint alone: layers that begin at zero are like that. Or
    a tensor has finite values of 8.6e9 (2^33) and more, in float16 of 32768 and more, which no training leaves.
    Of an adapter, a factor is zero that does not begin so, or that is not zero in any other layer.
    """
    huge = {n: above for n, (_, above) in odd_values(case, context).items() if above and _IS_LEARNT.search(n)}
    if huge:
        text = f"{sum(huge.values())} values in {len(huge)} tensors are larger than any weight is: {fold(huge)}"
        yield _finding(case, text, huge, "values that are too large:")
    if case.kind == "training":
        return  # what would be gathered of it is looked at
    if case.kind == "adapter":
        yield from _silent_factors(case, context)
        return
    scales: dict[str, float] = {}
    constant: dict[str, float] = {}
    heads = set(heads_here(case))
    for name, entry in case.survey.entries.items():
        if not is_matrix_of_layer(name, entry.tensor) or name in heads:
            continue
        try:
            sample = sample_of(entry.tensor, context)
            is_constant = len(set(sample)) == 1 and _is_one_number(entry.tensor, context)
        except ConvertError:
            continue
        if not all(map(math.isfinite, sample)) or not any(sample):
            continue
        if is_constant:
            constant[name] = sample[0]
        else:
            scales[name] = math.sqrt(math.fsum(v * v for v in sample) / len(sample))
    large, small = _off(scales, case)
    if constant:
        yield _finding(case, f"{len(constant)} matrices hold one number everywhere: {fold(constant)}", constant, "is")
    for found, word, severity in ((large, "larger", "changes-numbers"), (small, "smaller", "cosmetic")):
        if found:
            first, usual = next(iter(found.items()))
            what = f"values at least {_OFF:g} times {word} than those at their place in other layers"
            scale = f"{show(first)} has a root mean square of {scales[first]:.3g}, others {usual:.3g}"
            text = f"{len(found)} matrices have {what}: {fold(found)}; {scale}"
            numbers = {n: scales[n] for n in found}
            made = _finding(case, text, numbers, "has a root mean square of")
            yield made if severity == "changes-numbers" else _as_hint(made)


def _silent_factors(case: Case, context: Context) -> Iterable[Finding]:
    """Factors of zeros: no training makes them of what PEFT draws, nor in one layer alone of what begins at zero."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, entry in case.survey.entries.items():
        match = factor_in_name().match(name)
        is_trained = entry.info.numel > 0 and entry.info.dtype.is_float and not name.endswith(".bias")
        if match is not None and is_trained and match["kind"] not in _PRUNED:
            groups.setdefault((_NUMBER.sub("N", match["module"]), match["kind"]), []).append(name)
    silent: list[str] = []
    cut: list[str] = []
    for (module, kind), names in groups.items():
        zeros = [n for n in names if is_zero(case.survey.entries[n].tensor, context)]
        is_alone = len(zeros) < len(names) and ".experts." not in f".{module}."
        if is_alone or kind == LORA_PAIR[0]:
            silent += zeros
        cut += [n for n in names if n not in zeros and has_zero_part(case.survey.entries[n].tensor, context)]
    if cut:
        text = f"{len(cut)} factors have a rank's part that is zero: {fold(cut)}"
        yield _finding(case, text, dict.fromkeys(cut, 0.0), "is in part")
    if silent:
        text = f"{len(silent)} factors are zero, so their modules do nothing: {fold(silent)}"
        yield _finding(case, text, dict.fromkeys(silent, 0.0), "is")


def _as_hint(found: Finding) -> Finding:
    return Finding(
        code=found.code, severity="cosmetic", text=found.text, tensors=found.tensors, evidence=found.evidence
    )


def _finding(case: Case, text: str, numbers: Mapping[str, float], verb: str) -> Finding:
    return Finding(
        code="suspicious-values",
        severity="changes-numbers",
        text=text,
        tensors=tuple(numbers),
        evidence=tuple(f"{show(n)} {verb} {v:.4g}" for n, v in list(numbers.items())[:3]) or folded(case, numbers),
        recoverability=LOST,
    )


def is_matrix_of_layer(name: str, tensor: LazyTensor) -> bool:
    """True for a weight of a layer that is stored as plain floats: no factor of LoRA, no embedding, no vector."""
    shape = tensor.info.shape
    is_matrix = len(shape) > 1 and min(shape) > 1 and LAYERS.search(name) is not None
    is_embedding = INPUT.search(name) is not None or OUTPUT.search(name) is not None
    return is_matrix and tensor.info.dtype in _PLAIN and ".lora_" not in name and not is_embedding


def sample_of(tensor: LazyTensor, context: Context) -> list[float]:
    """Values from the beginning, the end and between."""
    count = tensor.info.numel
    flat = reshape(tensor, (count,))
    length = min(_LENGTH, -(-count // _STRETCHES))
    starts = sorted({round(k * (count - length) / max(_STRETCHES - 1, 1)) for k in range(_STRETCHES)})
    return [v for start in starts for v in values(narrow(flat, 0, start, length), context)]


def _is_one_number(tensor: LazyTensor, context: Context) -> bool:
    """True where every value is the one before it."""
    count = tensor.info.numel
    flat = reshape(tensor, (count,))
    return context.equal(narrow(flat, 0, 0, count - 1), narrow(flat, 0, 1, count - 1))


def _off(scales: Mapping[str, float], case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Matrices that are too large, and too small, with what is usual at their place."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in scales:
        groups.setdefault((_NUMBER.sub("N", name), case.survey.entries[name].info.shape), []).append(name)
    overall = statistics.median(scales.values()) if scales else 0.0
    large: dict[str, float] = {}
    small: dict[str, float] = {}
    for names in groups.values():
        for name in names:
            others = [scales[n] for n in names if n != name]
            if not others:
                continue
            usual = _usual(others, overall)
            if scales[name] > _OFF * usual:
                large[name] = usual
            elif scales[name] * _OFF < usual:
                small[name] = usual
    return large, small


def _usual(others: Sequence[float], overall: float) -> float:
    """The median of the siblings; of one alone, whichever is nearer to the model's own: either may be the odd one."""
    if len(others) >= _LEAST_SIBLINGS:
        return statistics.median(others)
    (other,) = others
    return other if overall / _OFF < other < overall * _OFF else overall
