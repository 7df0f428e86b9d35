"""`prune-lora`: a LoRA adapter at a lower rank, each pair the best of that rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from converter.converters.adapters.pairs import Pair, read_pairs, with_ranks
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.kernel_specs import Param
from converter.core.tensors.low_rank_specs import PRODUCT_FACTOR
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused, UsageError
from converter.text import fold, show


@dataclass(frozen=True)
class PruneLora:
    """Lower the rank of the LoRA adapter that flows through.

    Attributes:
        rank: of every pair that has a larger one.
    """

    name: ClassVar[str] = "prune-lora"

    rank: int

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The adapter, every scale what it was.

        Raises:
            UsageError: the rank is not 1 or more (`usage`).
            Refused: it is not plain LoRA (`not-plain-lora`), its experts are stacked (`adapter-stacked`), or no pair
                has a larger rank (`no-op`).
        """
        if self.rank < 1:
            raise UsageError("usage", "--rank is 1 or more", got=str(self.rank))
        found = read_pairs(checkpoint)
        where = show(checkpoint.origin.asked)
        if stacked := [p.module for p in found.pairs if p.is_stacked]:
            what = f"the factors of {fold(stacked)} are of all experts of a layer, whose ranks are lowered one by one"
            step = "take them apart first: rlhf-convert convert-lora --for transformers@4"
            raise Refused("adapter-stacked", what, where=where, next=step)
        if all(p.rank <= self.rank for p in found.pairs):
            largest = max(p.rank for p in found.pairs)
            raise Refused("no-op", "no pair has a larger rank", where=where, got=f"--rank {self.rank}; r = {largest}")
        out: dict[str, LazyTensor] = dict(checkpoint.tensors)
        pairs: list[Pair] = []
        for pair in found.pairs:
            if pair.rank > self.rank:
                out |= self._lowered(pair)
                pair = dataclasses.replace(pair, rank=self.rank)
            pairs.append(pair)
        config = with_ranks(checkpoint.config, pairs) | {"init_lora_weights": True}
        return checkpoint.replace(tensors=out, config=config)

    def _lowered(self, pair: Pair) -> dict[str, LazyTensor]:
        found: dict[str, LazyTensor] = {}
        for part, key, old in (("A", pair.keys[0], pair.a), ("B", pair.keys[1], pair.b)):
            out = old.info.dtype.value
            params: dict[str, Param] = {"part": part, "rank": self.rank, "scale": pair.scale, "out": out}
            found[key] = tensors.apply(PRODUCT_FACTOR, (pair.b, pair.a), params)
        return found
