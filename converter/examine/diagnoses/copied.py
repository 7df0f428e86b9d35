"""Matrices that hold another one's bytes, under `--deep`: a copy over the wrong name, or layers that were copied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import combinations

from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor, narrow
from converter.errors import ConvertError
from converter.examine.diagnoses.case import LOST, Case, Finding, diagnosis
from converter.examine.diagnoses.heads import heads_here
from converter.examine.diagnoses.odd_values import is_matrix_of_layer, sample_of
from converter.families.factors import factor_in_name, zero_factors
from converter.families.quantised.reading import read
from converter.text import fold, show

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)", re.ASCII)
_POSITIONS = re.compile(r"(?:^|[._])(?:pos(?:it\w*)?|wpe)(?=[._]|$)", re.ASCII)
"""Tables of positions: those of sines are the same in an encoder and its decoder (Marian, Pegasus)."""

_LEAST_DISTINCT = 16
"""Of so many different values at least: of a few, equal matrices are chance or design, as identities are."""

_LEAST_CODES, _SAMPLED = 128, 4096
"""Bytes of codes or scales: of fewer, two are equal by chance; so many of the first are read."""

_OWN_TO_EACH = frozenset({"weight", "qweight", "packed", "blocks", "scale", "scales", "absmax", "nested_absmax"})
"""Parts of quantised weights, by what each is, that no two weights share; tables, orders and shapes are shared."""

_MOST_EQUAL = 16
"""Of so many that are alike, all are compared with all."""


@diagnosis("copied-tensors", "model", "adapter", deep=True)
def copied_tensors(case: Case, context: Context) -> Iterable[Finding]:
    """Two matrices of different places hold the same bytes, and what is beside them differs: one was written over the
    other. Training never makes two matrices equal. Where whole layers or modules are equal (a model made deeper by
    copying layers, experts or prediction layers that begin as copies), or the same pair is equal in every layer, it is
    a design, and a hint alone. Of an adapter, a factor that begins as zeros and is trained holds another one's bytes.
    """
    groups = _alike(case, context)
    pairs = [pair for group in groups for pair in _equal_pairs(group, context)]
    if case.kind == "adapter":
        pairs = [(a, b) for a, b in pairs if _EXPERT.sub("N", a) != _EXPERT.sub("N", b)]  # experts may share a factor
    looked_at = {name for group in groups for name, _ in group}
    equal = {frozenset(pair) for pair in pairs}
    wrong = [pair for pair in pairs if not _is_design(pair, equal, looked_at)]
    designed = [pair for pair in pairs if pair not in wrong]
    if wrong:
        (first, second), names = wrong[0], tuple(dict.fromkeys(n for pair in wrong for n in pair))
        text = f"{show(second)} holds the bytes of {show(first)}, and their neighbours differ: one is written over"
        more = f"; {len(wrong) - 1} more such pairs: {fold(names)}" if len(wrong) > 1 else ""
        yield Finding(
            code="copied-tensors",
            severity="changes-numbers",
            text=text + more,
            tensors=names,
            evidence=tuple(f"{show(a)} = {show(b)}" for a, b in wrong[:3]),
            recoverability=LOST,
        )
    if designed:
        copies = tuple(dict.fromkeys(b for _, b in designed))
        text = f"{len(copies)} matrices are copies of others, with all around them: {fold(copies)}"
        shown = tuple(f"{show(a)} = {show(b)}" for a, b in designed[:1])
        yield Finding(code="copied-tensors", severity="cosmetic", text=text, tensors=copies, evidence=shown)


Group = list[tuple[str, LazyTensor]]


def _alike(case: Case, context: Context) -> list[Group]:
    """Matrices that are alike in a sample, with those that are like no other."""
    heads = set(heads_here(case))
    weights = read(case.shapes, case.config).weights
    codes = {n for w, _ in weights for part, n in w.parts.items() if part in _OWN_TO_EACH}
    groups: dict[object, Group] = {}
    for name, entry in case.survey.entries.items():
        is_of_layer = is_matrix_of_layer(name, entry.tensor) or (name in codes and _NUMBER.search(name))
        if case.kind == "adapter":
            is_of_layer = _begins_as_zeros(name)
        if name in heads or _POSITIONS.search(name) or not is_of_layer:
            continue
        try:
            key = _codes(entry.tensor, context) if name in codes else _floats(entry.tensor, context)
        except ConvertError:
            continue
        if key is not None:
            groups.setdefault((entry.info, key), []).append((name, entry.tensor))
    return list(groups.values())


def _begins_as_zeros(name: str) -> bool:
    """True for a factor that no two modules have alike once it is trained; drawn ones may be, by their seed."""
    found = factor_in_name().match(name)
    return found is not None and found["kind"] in zero_factors()


def _equal_pairs(group: Group, context: Context) -> Iterator[tuple[str, str]]:
    """Those with the same bytes, two by two."""
    for (a, left), (b, right) in combinations(group[:_MOST_EQUAL], 2):
        try:
            if left != right and context.equal(left, right):
                yield a, b
        except ConvertError:
            continue


def _floats(tensor: LazyTensor, context: Context) -> int | None:
    """What tells most matrices apart; None of one that has few different values."""
    sample = sample_of(tensor, context)
    is_telling = len(set(sample)) >= _LEAST_DISTINCT and 2 * sample.count(0.0) < len(sample)
    return hash(tuple(sample)) if is_telling else None


def _codes(tensor: LazyTensor, context: Context) -> int | None:
    """The same of a part of a quantised weight, by its bytes."""
    rows = tensor.info.shape[0] if tensor.info.shape else 0
    head = narrow(tensor, 0, 0, min(rows, max(1, _SAMPLED * rows // max(1, tensor.info.nbytes)))) if rows else tensor
    raw = context.read(head)
    return hash(raw) if tensor.info.nbytes >= _LEAST_CODES and len(set(raw)) >= _LEAST_DISTINCT else None


def _is_design(pair: tuple[str, str], equal: set[frozenset[str]], looked_at: set[str]) -> bool:
    """True where the modules around two equal matrices are mostly equal too, or every layer has the same pair."""
    a, b = pair
    if _NUMBER.sub("N", a) != _NUMBER.sub("N", b) and _is_in_every_layer(a, b, equal, looked_at):
        return True
    for mine, theirs in _modules(a, b):
        others = [n for n in looked_at if n.startswith(mine) and n != a]
        shared = [(n, m) for n in others if (m := theirs + n.removeprefix(mine)) in looked_at]
        if shared:
            return 2 * sum(frozenset(each) in equal for each in shared) >= len(shared)
    return not _NUMBER.search(a)  # nothing is beside them: modules that share a weight were saved twice


def _modules(a: str, b: str) -> Iterator[tuple[str, str]]:
    """Modules that hold the two under the same end, the smallest first."""
    left, right = a.split("."), b.split(".")
    for cut in range(1, min(len(left), len(right))):
        if left[-cut:] != right[-cut:]:
            break
        yield ".".join(left[:-cut]) + ".", ".".join(right[:-cut]) + "."


def _is_in_every_layer(a: str, b: str, equal: set[frozenset[str]], looked_at: set[str]) -> bool:
    """True where the same two places hold equal bytes in each of several layers."""
    if _NUMBER.findall(a) != _NUMBER.findall(b):
        return False
    places = [n for n in looked_at if _NUMBER.sub("N", n) == _NUMBER.sub("N", a)]
    end = _numbered(b)
    twins = [frozenset((n, _with_numbers(end, n))) for n in places]
    return len(twins) > 1 and all(each in equal for each in twins)


def _numbered(name: str) -> list[str]:
    return _NUMBER.split(name)


def _with_numbers(parts: list[str], like: str) -> str:
    numbers = [*_NUMBER.findall(like), ""]
    return "".join(f"{part}{number}" for part, number in zip(parts, numbers, strict=False))
