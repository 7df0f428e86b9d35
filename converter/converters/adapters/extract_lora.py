"""`extract-lora`: the LoRA adapter that a tuned model is of its base, by the singular vectors of what changed.

The way back of `merge-lora`. Each matrix that changed gets the best `B @ A` of its difference at a rank, or at the rank
that keeps a share of its energy; what it leaves out is measured and kept in the receipt. What did not change, bit by
bit, gets nothing. Heads, embeddings and norms that changed are kept whole. Experts that a load stacks get a pair for
the whole stack, as PEFT has them: `target_parameters`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from converter.converters.adapters.changed import BIAS, FACTORS, WHOLE, Changes, Tensor, find_changes
from converter.converters.adapters.expert_pairs import Joined, named, put_together
from converter.converters.adapters.pairs import Pair
from converter.converters.adapters.peft_config import PEFT_VERSION, lora_config, target_modules, task_of
from converter.converters.merge.orientation import is_conv1d
from converter.converters.merge.quantised.whole import found_in
from converter.core.checkpoint import ADAPTER, MODEL, Checkpoint, Input
from converter.core.context import Context
from converter.core.side_files import is_tokenizer_file
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.kernel_specs import Param
from converter.core.tensors.low_rank_specs import DIFFERENCE_FACTOR, ENOUGH_RANK
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, as_argument
from converter.errors import Refused, UsageError
from converter.families.words import PEFT_PREFIX
from converter.text import fold, show


@dataclass(frozen=True)
class ExtractLora:
    """Make a LoRA adapter of the tuned model that flows through and its base.

    Attributes:
        base: the model that training began with.
        rank: of every pair of factors; a matrix with fewer rows or columns has no larger one.
        energy: the share of each difference's squared norm that its pair keeps, in place of a rank.
    """

    name: ClassVar[str] = "extract-lora"

    base: Input
    rank: int | None = None
    energy: float | None = None

    compares_models: ClassVar[bool] = True

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The adapter, in PEFT's format, its factors in fp32.

        Raises:
            UsageError: neither a rank nor an energy, or both, or one that is out of range (`usage`).
            Refused: one of the two is not a whole model in plain numbers (`base-quantised`, `models-differ`), they are
                equal (`no-op`), or what changed has no place in an adapter (`adapter-no-place`).
        """
        self._expect_sound()
        for model in (checkpoint, self.base):
            _expect_plain(model)
        changes = find_changes(checkpoint, self.base, context)
        if changes.tokens:
            text = (
                f"the vocabulary grew to {changes.tokens} rows, and the embeddings are kept whole: merge-lora takes "
                f"them over the base as it is; PEFT loads them after resize_token_embeddings({changes.tokens})"
            )
            context.note("info", "vocabulary-grew", text)
        ranks = {m: self._rank(changes.modules[m]["weight"], context) for m in changes.of(FACTORS)}
        # Differences that are zero though the bits differ: another dtype, or a sign of zero.
        factored = {m: rank for m, rank in ranks.items() if rank}
        experts = put_together(list(self._experts(changes, context)), self.base, {})
        if not factored and not experts.pairs:
            what = f"no linear layer changed, only {fold(changes.places)}: an adapter without LoRA is none"
            raise Refused("adapter-no-place", what, where=show(checkpoint.origin.asked))
        bias, biases = _biases(changes, factored)
        out: dict[str, LazyTensor] = {}
        for module, held in changes.modules.items():
            if module in factored:
                out |= self._factors(module, held["weight"], factored[module], checkpoint.config)
            if changes.places.get(module) == WHOLE:
                out |= {f"{PEFT_PREFIX}{module}.{leaf}": t.tuned for leaf, t in held.items()}
        out |= biases
        out |= {key: t for p in experts.pairs for key, t in zip(p.keys, (p.a, p.b), strict=True)}
        config = self._config(checkpoint, changes, factored, bias, experts)
        return self._adapter(checkpoint, changes, out, config)

    def _experts(self, changes: Changes, context: Context) -> Iterator[Pair]:
        """A pair for each changed expert, by its name on disk."""
        for weight in changes.experts.values():
            rank = self._rank(weight, context)
            if rank:
                assert weight.base is not None
                a, b = (self._factor(weight, part, rank, transposed=False) for part in ("A", "B"))
                yield named(weight.module, a, b, 1.0)

    def _expect_sound(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise UsageError("usage", "give one of --rank and --energy", expected="--rank 32, or --energy 0.99")
        if self.rank is not None and not 1 <= self.rank <= 65_536:
            raise UsageError("usage", "--rank is 1 or more", got=str(self.rank))
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError("usage", "--energy is a share, above 0 and up to 1", got=str(self.energy))

    def _rank(self, weight: Tensor, context: Context) -> int:
        rows, columns = weight.tuned.info.shape
        if self.rank is not None:
            return min(self.rank, rows, columns)
        assert weight.base is not None
        params = {"energy": float(self.energy or 1), "transposed": False}
        found = context.compute(tensors.apply(ENOUGH_RANK, (weight.tuned, weight.base), params))
        return int.from_bytes(found, "little", signed=True)

    def _factors(self, module: str, weight: Tensor, rank: int, config: Mapping[str, Any]) -> dict[str, LazyTensor]:
        turned = is_conv1d(f"{module}.weight", config)
        return {
            f"{PEFT_PREFIX}{module}.lora_{part}.weight": self._factor(weight, part, rank, transposed=turned)
            for part in ("A", "B")
        }

    def _factor(self, weight: Tensor, part: str, rank: int, *, transposed: bool) -> LazyTensor:
        assert weight.base is not None
        params: dict[str, Param] = {"part": part, "rank": rank, "transposed": transposed, "out": DType.F32.value}
        return tensors.apply(DIFFERENCE_FACTOR, (weight.tuned, weight.base), params)

    def _config(
        self, tuned: Checkpoint, changes: Changes, ranks: Mapping[str, int], bias: str, experts: Joined
    ) -> dict[str, Any]:
        weights = [m for m, held in changes.modules.items() if len(_shape(held)) > 1]
        made = lora_config(
            task=task_of(tuned.config),
            base=self.base.origin.asked,
            ranks={**ranks, **{p.module: p.rank for p in experts.pairs}},
            targets=target_modules(list(ranks), weights, list(changes.modules)),
            saved=changes.of(WHOLE),
            bias=bias,
            fan_in_fan_out=any(is_conv1d(f"{m}.weight", tuned.config) for m in ranks),
            model=tuned.config,
        )
        if not experts.pairs:
            return made
        return made | {"target_parameters": list(experts.parameters), "peft_version": PEFT_VERSION}

    def _adapter(
        self, tuned: Checkpoint, changes: Changes, out: Mapping[str, LazyTensor], config: Mapping[str, Any]
    ) -> Checkpoint:
        read = {id(t) for t in out.values()}
        held = {n: t for n, t in tuned.tensors.items() if n in changes.equal and id(t) not in read}
        same = "the base's, bit by bit: an adapter leaves it alone"
        aside = {self.base.origin.path: "the adapter is over it; what did not change is there"}
        rest = dict.fromkeys(_left_over(tuned, changes), "the base's: its parameter has no place in an adapter")
        return Checkpoint(
            tensors=dict(out),
            config=config,
            origin=dataclasses.replace(tuned.origin, kind=ADAPTER),
            side_files={n: f for n, f in tuned.side_files.items() if is_tokenizer_file(n)},
            metadata={"format": "pt"},
            dropped={**tuned.dropped, **dict.fromkeys(held, same), **rest},
            beside=tuned.beside,
            set_aside={**tuned.set_aside, **aside},
            inputs={**self.base.inputs, **tuned.inputs},
            checks=tuned.checks,
            left=tuned.left,
        )


def _shape(held: Mapping[str, Tensor]) -> tuple[int, ...]:
    return held["weight"].tuned.info.shape if "weight" in held else ()


def _left_over(tuned: Checkpoint, changes: Changes) -> list[str]:
    """Names of tensors that no module keeps: parameters that the user consented to leave, and old buffers."""
    placed = {id(t.tuned) for m, held in changes.modules.items() if m in changes.places for t in held.values()}
    known = {*changes.equal, *changes.experts}
    return [n for n, t in tuned.tensors.items() if n not in known and id(t) not in placed]


def _biases(changes: Changes, ranks: Mapping[str, int]) -> tuple[str, dict[str, LazyTensor]]:
    """PEFT's `bias`, and the biases that the adapter holds: with one that changed, all of its kind, as PEFT saves them.

    A layer under LoRA has its bias at `base_layer.bias`, where alone PEFT's loader finds it.
    """
    linear = [m for m, held in changes.modules.items() if "bias" in held and changes.places.get(m) != WHOLE]
    changed = {m for m in linear if changes.modules[m]["bias"].changed}
    if not changed:
        return "none", {}
    is_all = any(changes.places.get(m) == BIAS for m in changed) or not changed <= ranks.keys()
    kept = linear if is_all else [m for m in linear if m in ranks]
    found = {
        f"{PEFT_PREFIX}{m}.{'base_layer.' if m in ranks else ''}bias": changes.modules[m]["bias"].tuned for m in kept
    }
    return "all" if is_all else "lora_only", found


def _expect_plain(model: Checkpoint) -> None:
    asked = model.origin.asked
    if model.origin.kind != MODEL:
        is_adapter = model.origin.kind == ADAPTER
        what = "an adapter" if is_adapter else "a trainer's state"
        step = Command("merge-lora" if is_adapter else "gather", (as_argument(asked), "OUT"))
        raise Refused("models-differ", f"it is {what}, and a whole model is needed", where=show(asked), next=step)
    if found_in(model).weights:
        what = "the model is quantised, and what training changed is not in its numbers"
        step = Command("reshard", (as_argument(asked), "OUT", "--dequantize"))
        raise Refused("base-quantised", what, where=show(asked), next=step)
