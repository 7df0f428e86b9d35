"""Whether a checkpoint's tensors are the model that its own loader asks for: names and shapes, the head by its dialect.

What the class asks for is `families.expected`; a head that a dialect names takes the place of the class's own. What is
found here is what `doctor` names, what `verify` fails on, and what no verb writes without consent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.converters.heads.detect import detect, head_like
from converter.converters.heads.model import resolve
from converter.core.checkpoint import Checkpoint
from converter.core.files.names import rank_in
from converter.core.tensors.dtypes import DType
from converter.dialects.spec import Dialect
from converter.errors import ConvertError
from converter.families.expected import Comparison, Expected, Unknown, compare, expected
from converter.families.family import family
from converter.families.implied import Shape, class_of
from converter.families.memory_names import class_names
from converter.families.quantised.reading import plain_shapes
from converter.families.words import OUTPUT_PREFIXES
from converter.text import fold, show

MISSING, UNEXPECTED, MISSHAPEN = "tensors-missing", "tensors-unexpected", "tensors-misshapen"
MISTYPED = "tensors-mistyped"
CODES = (MISSHAPEN, MISSING, UNEXPECTED, MISTYPED)

_EMPTY: Shape = (0,)
_NORMALISER = "normalizer."
_LEAST_RANKS, _MOST_RANKS = 2, 4096


@dataclass(frozen=True)
class Slices:
    """Tensors that are one part of several: each has 1/ranks of what is asked, along one dimension.

    Attributes:
        rows: every one is cut along its first dimension, the norms too: FSDP's way, not tensor parallelism's.
        rank: which of them, where the folder's name says.
    """

    names: tuple[str, ...]
    ranks: int
    rows: bool
    rank: int | None = None

    @property
    def words(self) -> str:
        """What it is, and what is missing."""
        how = "FSDP" if self.rows else "tensor-parallel"
        rest = self.ranks - 1
        others = f"the other {rest} are" if rest > 1 else "the other one is"
        which = "one rank" if self.rank is None else f"rank {self.rank}"
        return f"{which} of {self.ranks} ({how}) saved its own slices, and {others} not in it"


@dataclass(frozen=True)
class Judgement:
    """What keeps a checkpoint from being its model.

    Attributes:
        unknown: why names and shapes can't be checked, for every verdict; empty where they were.
        comparison: what differs; nothing where the family is unknown.
        wanted: what the class asks for.
        dialect: whose head it has, where that is not the class's own.
        mistyped: weights of types that only quantised models store, in one that is none.
        refused: it is unknown since transformers does not build the class of this config.
    """

    unknown: str
    comparison: Comparison
    wanted: Expected | None = None
    dialect: Dialect | None = None
    slices: Slices | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    mistyped: Mapping[str, DType] = field(default_factory=dict)
    refused: bool = False

    @property
    def codes(self) -> tuple[str, ...]:
        """Codes of what differs, the likeliest cause first."""
        found: dict[str, Collection[str]] = {MISSHAPEN: self.comparison.misshapen, MISSING: self.comparison.missing}
        found[UNEXPECTED] = self.comparison.unexpected
        found |= {MISTYPED: self.mistyped}
        return tuple(code for code in CODES if found[code])

    def names(self, code: str) -> tuple[str, ...]:
        """Names of the tensors that a code is about, as they are stored."""
        found: Collection[str] = {
            MISSING: self.comparison.missing,
            UNEXPECTED: self.comparison.unexpected,
            MISSHAPEN: self.comparison.misshapen,
            MISTYPED: self.mistyped,
        }[code]
        return tuple(self.aliases.get(n, n) for n in found)

    def words(self, code: str) -> str:
        """One sentence: how many, which, of what shapes, and why, where that shows."""
        names, found = self.names(code), self.comparison
        if code == MISSING:
            shapes = f" {list(next(iter(found.missing.values())))}" if len(names) == 1 else ""
            text = (
                f"{len(names)} of {found.asked} tensors that {self._class} asks for are missing: {fold(names)}{shapes}"
            )
            return f"{text}; {self._prefix_words() or 'a loader would make them RANDOM'}"
        if code == UNEXPECTED:
            text = f"{len(names)} tensors are none that {self._class} asks for: {fold(names)}"
            return f"{text}; {self._prefix_words() or 'a loader passes over them'}"
        if code == MISTYPED:
            kinds = " and ".join(sorted({t.value for t in self.mistyped.values()}))
            text = f"{len(names)} weights are {kinds}, and nothing says that the model is quantised: {fold(names)}"
            return f"{text}; loaders take such numbers for weights"
        first, (have, asked) = next(iter(found.misshapen.items()))
        shown = f"{show(self.aliases.get(first, first))} is {list(have)}, and {list(asked)} is asked for"
        text = (
            f"{len(names)} of {found.asked} tensors have other shapes than config.json implies: {fold(names)}; {shown}"
        )
        return f"{text}: {self.slices.words}" if self.slices is not None else text

    @property
    def _class(self) -> str:
        return show(self.wanted.name) if self.wanted is not None else "the class"

    def _prefix_words(self) -> str:
        prefix = self.prefix
        return f"every name has `{show(prefix)}` before it" if prefix else ""

    @property
    def prefix(self) -> str:
        """What stands before every name that is too many, where the rest of it is one that is missing; else empty."""
        return _common_prefix(self.comparison)


def judge(checkpoint: Checkpoint, names: Mapping[str, str] | None = None) -> Judgement:
    """Compare a model's tensors with what its loader asks for, by headers alone.

    Args:
        names: plain names by stored names, where wrappers are to be looked through.
    """
    wanted = expected(checkpoint.config)
    if isinstance(wanted, Unknown):
        return Judgement(
            wanted.words, Comparison({}, {}, {}, 0), mistyped=_mistyped(checkpoint), refused=wanted.refused
        )
    plain = names or {}
    aliases = {plain.get(n, n): n for n in checkpoint.tensors}
    infos = {plain.get(n, n): t.info for n, t in checkpoint.tensors.items()}
    stored = plain_shapes(infos, checkpoint.config, wanted.saved)
    dialect = _dialect(checkpoint, wanted)
    heads: frozenset[str] = frozenset()
    if dialect is not None:
        stored, heads, back = _canonical(stored, dialect, checkpoint)
        aliases = {new: aliases.get(old, old) for new, old in back.items()}
    found = _without_heads(compare(stored, wanted, checkpoint.config), wanted, heads, dialect)
    whole = {n: pair for n, pair in found.misshapen.items() if pair[0] != _EMPTY}
    found = Comparison(found.missing, found.unexpected, whole, found.asked)
    return Judgement("", found, wanted, dialect, _slices(whole, checkpoint.origin.name), aliases, _mistyped(checkpoint))


def _mistyped(checkpoint: Checkpoint) -> dict[str, DType]:
    """Weights of integers, truths or narrow floats, where neither the config nor a scale says what they stand for."""
    inner = [v for v in checkpoint.config.values() if isinstance(v, Mapping)]
    if any(_SAYS_QUANTISED.fullmatch(key) for each in (checkpoint.config, *inner) for key in each):
        return {}
    typed = {n: t.info.dtype for n, t in checkpoint.tensors.items() if n.endswith(".weight") and t.info.numel}
    found = {n: dtype for n, dtype in typed.items() if dtype not in _PLAIN}
    return {n: d for n, d in found.items() if not _is_scaled(n, checkpoint.tensors)} if found else {}


def _is_scaled(name: str, names: Collection[str]) -> bool:
    """True where a scale of its own stands beside a weight: `weight_scale_inv`, `weight.absmax`, `scale`, `SCB`."""
    stem = name.removesuffix("weight")
    return any(f"{stem}{part}" in names for part in _PARTS) or any(
        n.startswith((f"{name}_", f"{name}.")) and not n.endswith(_OF_TRAINING) for n in names
    )


_SAYS_QUANTISED = re.compile(r"quant(?:ization)?(?:_config)?|compression(?:_config)?")
_PARTS = ("scale", "scales", "scale_inv", "SCB", "absmax", "qzeros", "zero_point")
_OF_TRAINING = ("weight_integer",)
"""Buffers of layers that are quantised as they run, I-BERT's: the weight beside them is what it always is."""
_PLAIN = (DType.F64, DType.F32, DType.F16, DType.BF16)


def _dialect(checkpoint: Checkpoint, wanted: Expected) -> Dialect | None:
    """The dialect whose head is here, where it is not simply the class's."""
    try:
        found = detect(checkpoint)
    except ConvertError:
        return None
    if found is None or found.dialect.head.kind == "none":
        return None
    return None if is_of_another_class(found.dialect, checkpoint.config, wanted, checkpoint.tensors) else found.dialect


def is_of_another_class(dialect: Dialect, config: Mapping[str, Any], wanted: Expected, names: Collection[str]) -> bool:
    """True where a dialect's head is a class's of transformers, and config.json names another class of transformers
    that does not find its own head.
    """
    own = [n for n in wanted.saved if wanted.is_outside(n)]
    if own and all(n in names for n in own):
        return False
    ends = tuple(end for marks in dialect.marks for end in marks.classes)
    named = class_of(config) or ""
    return dialect.class_says and bool(ends) and named in class_names() and not named.endswith(ends)


def _canonical(
    stored: Mapping[str, Shape], dialect: Dialect, checkpoint: Checkpoint
) -> tuple[dict[str, Shape], frozenset[str], dict[str, str]]:
    """Names as transformers has them, those of the dialect's head, and stored names by the new ones."""
    kind, config = family(checkpoint.config), checkpoint.config
    try:
        own = resolve("{P}", kind, config)
        prefix, stem = (resolve(each, kind, config) for each in (dialect.backbone, dialect.head.stem))
    except ConvertError:
        return dict(stored), frozenset(head_like(stored)), {n: n for n in stored}
    made: dict[str, Shape] = {}
    back: dict[str, str] = {}
    heads: set[str] = set()
    extras = tuple(start for start, _ in dialect.extras)
    for name, shape in stored.items():
        new = name
        if _is_of_head(name, stem, dialect) or name.startswith((_NORMALISER, *extras)):
            heads.add(name)
        elif prefix != own and name.startswith(prefix):
            new = own + name.removeprefix(prefix)
        elif dialect.outer and name.startswith(dialect.outer):
            new = name.removeprefix(dialect.outer)
        made[new], back[new] = shape, name
    return made, frozenset(heads), back


def _is_of_head(name: str, stem: str, dialect: Dialect) -> bool:
    """True for a head's own tensors; what else stands under its name is left over, and no part of what is read."""
    if dialect.head.kind == "linear":
        return name in (stem, f"{stem}.weight", f"{stem}.bias")
    return name == stem or name.startswith(f"{stem}.")


def _without_heads(found: Comparison, wanted: Expected, heads: frozenset[str], dialect: Dialect | None) -> Comparison:
    """What differs, but for a head that is the dialect's: it has names and rows of its own."""
    if dialect is None:
        return found
    of_class = heads & wanted.saved.keys() and dialect.head.kind != "lm-row"
    # Under a class of transformers a head that no trainer looks for is left over, and the class's own output is random.
    is_nobodys = not dialect.serves and not wanted.free and not wanted.name.endswith("Model")
    lm_head = dialect.head.lm_head or (is_nobodys and not wanted.name.endswith("Classification"))

    def is_replaced(name: str) -> bool:
        """True for the class's head, in whose place the dialect's is."""
        if is_nobodys:
            return False
        is_output = name.startswith(OUTPUT_PREFIXES)
        return not of_class and wanted.is_outside(name) and not (is_output and lm_head)

    missing = {n: s for n, s in found.missing.items() if not is_replaced(n)}
    is_output_too = lm_head or not wanted.name.endswith(("Classification", "Model"))
    # A bias beside a class's own head that has none: a load passes over it.
    is_too_much = bool(of_class) and dialect.class_says and not wanted.free
    unexpected = {
        n: s
        for n, s in found.unexpected.items()
        if (n not in heads or is_too_much) and not (is_output_too and n.startswith(OUTPUT_PREFIXES))
    }
    misshapen = {n: p for n, p in found.misshapen.items() if n not in heads or of_class}
    return Comparison(missing, unexpected, misshapen, found.asked)


def _slices(misshapen: Mapping[str, tuple[Shape, Shape]], name: str) -> Slices | None:
    """Where every tensor of another shape is cut along one dimension by the same number."""
    cuts = [c for have, asked in misshapen.values() if (c := _cut(have, asked)) is not None]
    if not cuts or len(cuts) != len(misshapen):
        return None
    # Of what divides, the parts are equal; of the rest, as torch.chunk cuts it, the last one is smaller.
    even = {asked // have for have, asked, _ in cuts if not asked % have}
    if len(even) != 1 or not _LEAST_RANKS <= (count := even.pop()) <= _MOST_RANKS:
        return None
    if any(have not in {-(-asked // count), asked - -(-asked // count) * (count - 1)} for have, asked, _ in cuts):
        return None
    dims = {dim for _, _, dim in cuts}
    is_all = len(misshapen) > 1 and any(len(a) == 1 and _is_norm(n) for n, (_, a) in misshapen.items())
    rank = rank_in(name)
    return Slices(tuple(misshapen), count, dims == {0} and is_all, rank if rank is not None and rank < count else None)


def _cut(have: Shape, asked: Shape) -> tuple[int, int, int] | None:
    """The size that is there, the one that is asked for, and the one dimension in which they differ."""
    dims = [d for d, (a, b) in enumerate(zip(have, asked, strict=False)) if a != b]
    if len(have) != len(asked) or len(dims) != 1 or not 0 < have[dims[0]] < asked[dims[0]]:
        return None
    return have[dims[0]], asked[dims[0]], dims[0]


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name


def _common_prefix(found: Comparison) -> str:
    if not found.missing or not found.unexpected:
        return ""
    prefixes: dict[str, int] = {}
    for name in found.unexpected:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in found.missing:
                start = ".".join(parts[:cut]) + "."
                prefixes[start] = prefixes.get(start, 0) + 1
                break
    best = max(prefixes, key=lambda p: prefixes[p], default="")
    return best if best and prefixes[best] == len(found.unexpected) else ""


def rows_of_vocabulary(misshapen: Mapping[str, tuple[Shape, Shape]], names: Iterable[str]) -> bool:
    """True where all that differs is how many rows these tensors have, the same number each, and not a half or less."""
    vocabulary = set(names)
    rows = {(have[:1], have[1:] == asked[1:]) for have, asked in misshapen.values()}
    is_half = any(2 * have[0] <= asked[0] + 1 for have, asked in misshapen.values() if have and asked)
    return misshapen.keys() <= vocabulary and len(rows) <= 1 and all(same for _, same in rows) and not is_half
