"""Layers of DeepSpeed's pipelines under the names of the class in config.json, where these fit in one way only.

A `PipelineModule` numbers its layers in the order in which they run, and nothing records what they are. The class says
which modules there are, with which tensors. An assignment has to give every tensor of the class to one layer, in the
order in which a model runs: the input's embeddings, the layers by their numbers, what follows them, the output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.families.expected import Expected, Unknown, expected
from converter.families.ties import is_tied
from converter.families.words import INPUTS, OUTPUTS
from converter.text import show

_NUMBERED = re.compile(r"(\d+)\.(.+)", re.ASCII)
_TIED = re.compile(r"(tied_modules\.[^.]+)\.(.+)")
_LAYER = re.compile(r".*\.(?:layers?|h|blocks?)\.(\d+)\.", re.ASCII)
_MOST_STEPS = 200_000
Shape = tuple[int, ...]


def is_pipeline(found: Checkpoint) -> bool:
    """True where all names are numbers of layers, or modules that several layers share."""
    names = list(found.tensors)
    return bool(names) and all(_NUMBERED.fullmatch(n) or _TIED.fullmatch(n) for n in names)


def from_pipeline(found: Checkpoint, context: Context) -> Checkpoint:
    """The model under its class's names; the same where no pipeline was.

    Raises:
        Refused: the class is not known, or its names fit the layers in no way, or in several (`zero-pipeline`).
    """
    if not is_pipeline(found):
        return found
    wanted = expected(found.config)
    if isinstance(wanted, Unknown):
        raise _refuse(found, f"the layers of a pipeline have numbers, and which tensors they are is not known: "
                      f"{wanted.words}")  # fmt: skip
    search = _Search.of(found, wanted)
    solutions = search.solutions()
    if len(solutions) != 1:
        ways = "in no way" if not solutions else "in several ways"
        raise _refuse(
            found,
            f"the layers of a pipeline have numbers, and the tensors of {wanted.name} fit them {ways}",
        )
    names = dict(solutions[0])
    first = next(iter(names))
    context.note("info", "pipeline", f"layers are named as {wanted.name}'s, in the one way that fits: "
                 f"{first} is {names[first]}")  # fmt: skip
    return found.rename(names)


def _refuse(found: Checkpoint, what: str) -> Refused:
    asked = found.origin.asked
    state = Again(("--emit", "state"), otherwise=Command("gather", (asked, "OUT", "--emit", "state")))
    return Refused("zero-pipeline", what, where=show(asked), next=Steps("write the state dict: ", state))


@dataclass
class _Search:
    """The search for every assignment, which ends when there are two.

    Attributes:
        groups: tensors of each layer by the names that they have in it, in order of running; shared modules first.
        wanted: shapes of the class's tensors.
        needed: those of them that have to be there.
        rank: where each module runs.
    """

    groups: list[tuple[str, dict[str, Shape]]]
    wanted: Mapping[str, Shape]
    needed: frozenset[str]
    found: set[tuple[tuple[str, str], ...]] = field(default_factory=set)
    steps: int = 0

    @classmethod
    def of(cls, found: Checkpoint, wanted: Expected) -> _Search:
        """The search for a checkpoint's names."""
        groups: dict[str, dict[str, Shape]] = {}
        for name, tensor in found.tensors.items():
            match = _TIED.fullmatch(name) or _NUMBERED.fullmatch(name)
            assert match is not None
            groups.setdefault(match[1], {})[match[2]] = tensor.info.shape
        tied = is_tied(dict(found.config))
        needed = frozenset(n for n in wanted.saved if not (tied and n in OUTPUTS))
        ordered = sorted(groups.items(), key=lambda g: (g[0].isdigit(), int(g[0]) if g[0].isdigit() else 0))
        return cls(ordered, wanted.saved, needed)

    def solutions(self) -> list[tuple[tuple[str, str], ...]]:
        """Two assignments at most, each as pairs of a name that is there and the class's."""
        self._assign(0, {}, (-1, 0))
        return sorted(self.found)

    def _assign(self, index: int, taken: dict[str, str], last: tuple[int, int]) -> None:
        self.steps += 1
        if len(self.found) > 1 or self.steps > _MOST_STEPS:
            return
        if index == len(self.groups):
            if self.needed <= set(taken.values()):
                self.found.add(tuple(sorted(taken.items())))
            return
        before, own = self.groups[index]
        is_numbered = before.isdigit()
        for names in self._candidates(own):
            place = max(_place(n) for n in names.values())
            if set(names.values()) & set(taken.values()) or (is_numbered and place < last):
                continue
            if is_numbered and self._skips(place, names, taken):
                continue
            made = {**taken, **{f"{before}.{k}": n for k, n in names.items()}}
            self._assign(index + 1, made, place if is_numbered else last)

    def _skips(self, place: tuple[int, int], names: Mapping[str, str], taken: Mapping[str, str]) -> bool:
        """True where a tensor that has to be there runs before this place, and is no layer's yet."""
        held = {*taken.values(), *names.values()}
        return any(n not in held and _place(n) < place for n in self.needed)

    def _candidates(self, own: Mapping[str, Shape]) -> Iterator[dict[str, str]]:
        """The class's modules that have these tensors and no others, each as its names by those in the layer."""
        for keys in _without_own_words(list(own)):
            first = next(iter(keys))
            for name, shape in self.wanted.items():
                if shape != own[first] or not (name == keys[first] or name.endswith(f".{keys[first]}")):
                    continue
                before = name.removesuffix(keys[first])
                made = {k: before + rest for k, rest in keys.items()}
                inside = {n for n in self.wanted if n.startswith(before)} if before else set(self.wanted)
                if set(made.values()) == inside and all(self.wanted.get(n) == own[k] for k, n in made.items()):
                    yield made


def _without_own_words(keys: list[str]) -> Iterator[dict[str, str]]:
    """The names in a layer, and without words of the user's own that stand before all of them."""
    rest = {k: k for k in keys}
    while True:
        yield dict(rest)
        words = {r.partition(".")[0] for r in rest.values()}
        if len(words) != 1 or any("." not in r for r in rest.values()):
            return
        rest = {k: r.partition(".")[2] for k, r in rest.items()}


def _place(name: str) -> tuple[int, int]:
    """Where a tensor's module runs: before the layers, in one of them, or behind."""
    if match := _LAYER.match(name):
        return (1, int(match[1]))
    if name in OUTPUTS:
        return (3, 0)
    return (0, 0) if any(name == n or name.endswith(f".{n}") for n in INPUTS) else (2, 0)
