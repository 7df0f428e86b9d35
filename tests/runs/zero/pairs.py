"""Runs of DeepSpeed in which each two values of any two axes meet: ranks, stages, dtypes, models and ways.

The same numbers give the same runs, so that what lies saved is used again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"model": "lm"},
    "tied": {"model": "lm-tied", "groups": 2},
    "lora": {"model": "lora"},
    "frozen excluded": {"model": "lora", "exclude_frozen": True},
    "frozen head": {"model": "lora-frozen-head"},
    "score": {"model": "reward", "groups": 3},
    "buffers, odd sizes": {"model": "odd", "groups": 2},
    "sub-groups": {"model": "odd", "groups": 2, "zero": {"sub_group_size": 60}},
    "round robin": {"model": "odd", "groups": 2, "zero": {"round_robin_gradients": True}},
    "alignment": {"model": "odd", "groups": 2, "zero": {"parameter_alignment": True}},
    "BF16_Optimizer": {"model": "odd", "groups": 2, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
}
"""What `train.Case` takes beside the dtype."""

AXES: dict[str, tuple[Any, ...]] = {
    "kind": tuple(KINDS),
    "stage": (1, 2, 3),
    "to": (1, 2, 3),
    "dtype": ("fp32", "bf16", "fp16"),
    "before": (1, 2, 3, 4),
    "after": (1, 2, 3, 4, 6),
    "way": ("files of ranks", "our universal", "DeepSpeed's universal"),
}


@dataclass(frozen=True)
class Pair:
    """One run, and what it goes on as; `way`: what lies between the files of ranks that saved and those that load."""

    kind: str
    stage: int
    to: int
    dtype: str
    before: int
    after: int
    way: str

    @property
    def options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, **KINDS[self.kind]}

    @property
    def saved(self) -> str:
        word = "".join(c if c.isalnum() else "-" for c in self.kind)
        return f"{word}-{self.dtype}-z{self.stage}-n{self.before}"

    @property
    def name(self) -> str:
        return f"{self.saved}-m{self.after}-z{self.to}-{self.way.split()[0].rstrip('s').strip(chr(39)).lower()}"


def can_be(pair: Pair) -> bool:
    """True where DeepSpeed saves such a run and both tools take the way: what is refused has tests of its own."""
    own = {"sub-groups": (3,), "round robin": (1, 2), "alignment": (1, 2), "BF16_Optimizer": (1,)}
    if pair.stage not in own.get(pair.kind, (1, 2, 3)):
        return False
    if pair.kind == "BF16_Optimizer":  # it has no loss scaler, which other optimizers and the universal loader expect
        return pair.dtype == "bf16" and pair.to == pair.stage and pair.way != "our universal"
    return not (pair.kind == "round robin" and pair.way != "files of ranks")  # ds_to_universal scrambles it


def meetings(pair: Pair) -> Iterator[tuple[str, Any, str, Any]]:
    for one, other in itertools.combinations(AXES, 2):
        yield one, getattr(pair, one), other, getattr(pair, other)


def covering(seed: int = 1, tries: int = 60) -> list[Pair]:
    """Runs in which each meeting of two values that can be occurs: the best of some that are drawn, again and again."""
    rng = random.Random(seed)
    every = [p for values in itertools.product(*AXES.values()) if can_be(p := Pair(*values))]
    left = {m for p in every for m in meetings(p)}
    found: list[Pair] = []
    while left:
        wanted = rng.choice(sorted(left, key=repr))
        fitting = [p for p in every if wanted in meetings(p)]
        drawn = rng.sample(fitting, min(tries, len(fitting)))
        best = max(drawn, key=lambda p: len(left.intersection(meetings(p))))
        found.append(best)
        left.difference_update(meetings(best))
    return found
