"""What becomes of a head between any two dialects, worked out from their literals: the matrix of the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from converter.dialects.known import dialects, numbers
from converter.dialects.spec import Dialect

Kind = Literal["=", "L", "B", "S", "E", "X"]
LEGEND: dict[Kind, str] = {
    "=": "the same dialect",
    "L": "lossless",
    "B": "lossless where the head's bias is zero; else refused, or shifted by it with `--bias drop`",
    "S": "the scale of mean and std is kept; their shift is refused, or dropped with `--bias drop`",
    "E": "exact: in the hidden units of the target's ReLU MLP",
    "X": "refused: no such head gives the same numbers, or nobody reads it",
}


@dataclass(frozen=True)
class Cell:
    """One way from a dialect to another.

    Attributes:
        lm_head: the target wraps a causal model, and the source has no output embedding: `--base` unless tied.
        why: of a refusal, or a restriction.
    """

    kind: Kind
    lm_head: bool = False
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind} lm" if self.lm_head else self.kind


def cell(source: Dialect, target: Dialect, *, normalised: bool = False) -> Cell:
    """What becomes of a head with a bias, where the source's has one; and of mean and std where `normalised`."""
    if source.refused:
        return Cell("X", why=source.refused)
    if target.refused or not target.writable:
        return Cell("X", why=target.refused or "it is read, and not written")
    if source.own_backbone:
        return Cell("X", why=f"only {source.own_backbone}'s own code loads its backbone")
    if source.name == target.name:
        return Cell("=")
    kind = _kind(source, target, normalised)
    if kind == "X":
        return Cell("X", why="an MLP is not a linear layer, but where it holds one as two units")
    return Cell(kind, _needs_lm_head(source, target), _restriction(target))


def _kind(source: Dialect, target: Dialect, normalised: bool) -> Kind:
    if target.head.kind == "mlp":
        return "E"
    if source.head.kind == "mlp":
        return "X"
    if target.head.bias != "never":
        return "L"
    if normalised and source.normaliser != "none":
        return "=" if _keeps(source, target) else "S"
    return "B" if source.head.bias != "never" else "L"


def _keeps(source: Dialect, target: Dialect) -> bool:
    """Whether config.json has a place for mean and std, and the newest version reads them."""
    newest = max((s for s in target.serves if not s.refused), key=lambda s: numbers(s.until), default=None)
    reads = target.normaliser != "none" and newest is not None and newest.keeps_mean
    return source.normaliser == target.normaliser or reads


def _needs_lm_head(source: Dialect, target: Dialect) -> bool:
    return target.head.lm_head and not source.head.lm_head and source.head.kind != "lm-row"


def _restriction(target: Dialect) -> str:
    if target.families:
        return f"only {', '.join(target.families)}"
    return "only families with a token classification class" if "{tokcls}" in target.head.stem else ""


def sources() -> list[Dialect]:
    """Dialects that are recognised, by name."""
    return [d for d in dialects().values() if d.actor is None]


def targets() -> list[Dialect]:
    """Dialects that are written, by name."""
    return [d for d in sources() if d.writable and not d.refused]


def rows() -> list[tuple[str, list[Cell]]]:
    """Every source with its cells, in the order of `targets`; sources with mean and std once more."""
    found = [(d.name, [cell(d, t) for t in targets()]) for d in sources()]
    normalised = [d for d in sources() if d.normaliser != "none"]
    return found + [(f"{d.name} + mean/std", [cell(d, t, normalised=True) for t in targets()]) for d in normalised]


def markdown() -> str:
    """The matrix as a table, with its legend."""
    names = [t.name for t in targets()]
    lines = [_line(["from \\ to", *names]), _line(["---"] * (len(names) + 1))]
    lines += [_line([name, *(str(c) for c in cells)]) for name, cells in rows()]
    legend = "; ".join(f"`{kind}` {words}" for kind, words in LEGEND.items())
    tail = "`lm`: the output embedding comes from `--base`, unless it is tied."
    return "\n".join([*lines, "", f"{legend}. {tail}", ""])


def _line(cells: Iterable[str] | Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
