"""The matrices that an adapter's factors over experts change: one site for each expert and each tensor on disk.

A factor pair of all experts is taken apart without reading it: an expert's A is a stretch of rows, its B every so many
columns. PEFT has laid the two sides of a bare parameter out in three ways, so the shapes say which is which; where a
matrix is square, the other parameters of the adapter do, else the version that wrote it:

| peft | classes that say `is_transposed` | all others |
|---|---|---|
| up to 0.18 | A over rows | A over rows |
| 0.19.0 | A over columns | A over rows |
| from 0.19.1 | A over rows | A over columns |

Source: `_did_swap_in_out_features` of `ParamWrapper`, https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
(v0.19.0 and v0.18.1 for the others)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converter.converters.merge.adapter_keys import Module
from converter.converters.merge.experts import ExpertModule, needs_pair
from converter.converters.merge.layer import updates_of
from converter.converters.merge.methods.method import AdapterConfig, Region, Site, Update
from converter.converters.merge.patterns import matching
from converter.core.checkpoint import Checkpoint
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.stacks import Part, expert_count, is_transposed
from converter.families.words import LORA_PAIR
from converter.text import show

_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Placed:
    """A site with the tensor on disk that it is in, and the part of that tensor; None for all of it."""

    site: Site
    disk: str
    region: Region | None


@dataclass(frozen=True)
class ExpertSites:
    """What every site of an adapter's experts has in common.

    Attributes:
        raw: `adapter_config.json`.
    """

    base: Checkpoint
    config: AdapterConfig
    raw: Mapping[str, Any]
    weight: float
    numerics: str
    where: str

    def placed(self, found: Mapping[str, ExpertModule]) -> Iterator[tuple[str, tuple[Placed, ...]]]:
        """The sites of each module, by the module's name in the adapter.

        Raises:
            Refused: a factor is missing (`adapter-incomplete`), the rank is not the config's (`adapter-rank`), a shape
                does not fit (`adapter-shape`), the config asks for what PEFT does not do with parameters
                (`adapter-field-unsupported`), base and config count experts differently (`base-experts`), or nothing
                says how a square matrix was laid out (`adapter-expert-layout`).
        """
        for each in found.values():
            self._expect_plain(each)
            self._expect_count(each)
        turned = self._turned(found)
        for name, each in found.items():
            yield name, tuple(p for e in each.experts for p in self._of_expert(each, e, turned[name]))

    def updates(self, found: Mapping[str, ExpertModule]) -> Iterator[tuple[str, str, Update]]:
        """Every update, with the adapter's module that it is of and the tensor on disk that it changes."""
        for name, placed in self.placed(found):
            for each in placed:
                for update in updates_of(each.site):
                    yield name, each.disk, dataclasses.replace(update, region=each.region)

    # What is expected

    def _expect_plain(self, each: ExpertModule) -> None:
        """Plain LoRA for stacks: PEFT's wrapper of a parameter takes nothing else."""
        if each.expert is not None:
            return
        if not needs_pair(each.module):
            lacking = [f for f in LORA_PAIR if f not in each.module.factors]
            what = f"{lacking[0]} is missing" if lacking else "there are factors that PEFT does not have for parameters"
            raise Refused("adapter-incomplete", f"{show(each.name)}: {what}", where=self.where)
        method = self.config.method
        set_fields = [f for f in ("use_dora", "lora_bias") if self.raw.get(f)]
        moved = self.config.fields.get("init_lora_weights")
        set_fields += ["init_lora_weights"] if moved in ("pissa", "olora") else []
        if set_fields or method.peft_type != "LORA":
            what = f"`{set_fields[0]}` is set" if set_fields else f"{method.title} is over a parameter"
            raise Refused(
                "adapter-field-unsupported",
                f"{what}, and PEFT has only plain LoRA for parameters such as {show(each.name)}",
                where=self.where,
                facts={"field": set_fields[0]} if set_fields else {},
            )

    def _expect_count(self, each: ExpertModule) -> None:
        said, held = expert_count(self.base.config), each.stack.experts
        if len(each.stack.shape) == 3 and said is not None and said != held:
            raise Refused(
                "base-experts",
                f"config.json counts {said} experts, and {show(each.stack.name)} has {held}",
                where=show(self.base.origin.asked),
                expected=f"{said} experts",
                got=f"{held} experts",
            )

    def _rank(self, each: ExpertModule) -> int:
        rank: int = matching(self.config.fields["rank_pattern"], each.name, self.config.fields["r"])
        return rank

    def _sides(self, each: ExpertModule) -> tuple[int, int]:
        """Columns of A and rows of B, after their other sides fit the number of experts and the rank."""
        a, b = (each.module.factors[f].info.shape for f in LORA_PAIR)
        count, rank = each.stack.experts, self._rank(each)
        if each.is_linear:
            fits = (len(a), len(b)) == (3, 3) and a[:2] == (count, rank) and (b[0], b[2]) == (count, rank)
            if fits:
                return a[2], b[1]
        elif len(a) == len(b) == 2 and a[0] == b[1] == count * rank:
            return a[1], b[0]
        if len(a) == len(b) == 2 and a[0] == b[1] and a[0] % count:
            what = f"{a[0]} ranks of {show(each.name)} can't be shared by {count} experts"
        else:
            what = f"the rank of {show(each.name)} is not the one in adapter_config.json"
        raise Refused(
            "adapter-rank",
            what,
            where=self.where,
            expected=f"r = {rank} for each of {count} experts",
            got=f"A {list(a)}, B {list(b)}",
        )

    # Which side is which

    def _turned(self, found: Mapping[str, ExpertModule]) -> dict[str, bool]:
        """By module: A is over the rows of the matrix as the base has it, and the update is `(B A)^T`."""
        known: dict[str, bool | None] = {n: self._by_shape(e) for n, e in found.items()}
        stacked = {n for n, e in found.items() if e.expert is None and not e.is_linear and e.stack.experts > 1}
        witnesses = {known[n] for n in stacked if known[n] is not None}
        settled: dict[str, bool] = {}
        for name, each in found.items():
            turned = known[name]
            if turned is None and name in stacked:
                turned = self._of_square(each, witnesses)
            settled[name] = is_transposed(self.base.config) if turned is None else turned
        return settled

    def _by_shape(self, each: ExpertModule) -> bool | None:
        """What the shapes say; None where the matrix is square."""
        if each.expert is not None:
            a, b = (self._take(each, f).info.shape for f in LORA_PAIR)
            columns, rows = a[-1] if a else 0, b[0] if b else 0
        else:
            columns, rows = self._sides(each)
        height, width = each.rows[1] - each.rows[0], each.stack.matrix[1]
        direct, across = (rows, columns) == (height, width), (columns, rows) == (height, width)
        may_turn = each.stack.experts > 1 or each.is_linear
        if direct and across and may_turn:
            return None
        if direct or (across and may_turn):
            return not direct
        raise Refused(
            "adapter-shape",
            f"the factors of {show(each.name)} do not fit the base's {show(each.stack.name)}",
            where=self.where,
            expected=f"factors of {each.stack.experts} matrices {[height, width]}",
            got=f"A over {columns} and B over {rows}",
        )

    def _take(self, each: ExpertModule, factor: str) -> LazyTensor:
        if factor not in each.module.factors:
            raise Refused("adapter-incomplete", f"{show(each.name)}: {factor} is missing", where=self.where)
        return each.module.factors[factor]

    def _of_square(self, each: ExpertModule, witnesses: Collection[bool | None]) -> bool:
        """By the adapter's other parameters, else by the version of PEFT that wrote it."""
        if len(witnesses) == 1 and not each.stack.is_turned:
            return bool(next(iter(witnesses)))
        release = _RELEASE.match(str(self.raw.get("peft_version") or ""))
        if release is None or len(witnesses) > 1 or each.stack.is_turned:
            why = (
                "a load may exchange its rows and columns"
                if each.stack.is_turned
                else "adapter_config.json records no peft_version"
            )
            raise Refused(
                "adapter-expert-layout",
                f"the matrices of {show(each.stack.name)} are square, and {why}: which factor is over which side is "
                "not recorded",
                where=self.where,
                next="set peft_version in adapter_config.json to the one that training used",
            )
        version = tuple(int(n or 0) for n in release.groups())
        if version < (0, 19, 0):
            return True
        return is_transposed(self.base.config) is (version >= (0, 19, 1))

    # The sites

    def _of_expert(self, each: ExpertModule, expert: int, turned: bool) -> Iterator[Placed]:
        """The sites of one expert: one, or one for each tensor that its matrix is cut into on disk."""
        factors = self._factors(each, expert)
        for part in each.stack.parts:
            start, stop = max(part.start, each.rows[0]), min(part.stop, each.rows[1])
            if part.expert not in (None, expert) or start >= stop:
                continue
            is_stack = part.expert is None and len(each.stack.shape) == 3
            whole = not is_stack and (start, stop) == (part.start, part.stop)
            region = None if whole else Region(expert if is_stack else None, start - part.start, stop - part.start)
            own = self._cut(factors, each, start - each.rows[0], stop - start, turned)
            below = self._below(part, region)
            yield Placed(self._site(each, own, part, below, turned), part.disk, region)

    def _below(self, part: Part, region: Region | None) -> LazyTensor:
        """The base's own matrix, or the rows of it that a site is of."""
        stored = self.base.tensors[part.disk]
        if region is None:
            return stored
        if region.expert is not None:
            stored = tensors.reshape(tensors.narrow(stored, 0, region.expert, 1), stored.info.shape[1:])
        return tensors.narrow(stored, 0, region.start, region.stop - region.start)

    def _factors(self, each: ExpertModule, expert: int) -> dict[str, LazyTensor]:
        held = each.module.factors
        if each.expert is not None:
            return dict(held)
        a, b = (held[f] for f in LORA_PAIR)
        if each.is_linear:
            first, second = (tensors.reshape(tensors.narrow(t, 0, expert, 1), t.info.shape[1:]) for t in (a, b))
            return {LORA_PAIR[0]: first, LORA_PAIR[1]: second}
        count, rank = each.stack.experts, self._rank(each)
        first = tensors.narrow(a, 0, expert * rank, rank)
        if each.side_by_side:
            apart = tensors.reshape(b, (b.info.shape[0], rank, count))
            second = tensors.reshape(tensors.narrow(apart, 2, expert, 1), (b.info.shape[0], rank))
        else:
            second = tensors.narrow(b, 1, expert * rank, rank)
        return {LORA_PAIR[0]: first, LORA_PAIR[1]: second}

    def _cut(
        self, factors: dict[str, LazyTensor], each: ExpertModule, start: int, length: int, turned: bool
    ) -> dict[str, LazyTensor]:
        """The factors of a stretch of the module's rows."""
        if (start, length) == (0, each.rows[1] - each.rows[0]):
            return factors
        if set(factors) != set(LORA_PAIR):
            what = f"{show(each.name)} is cut into several tensors of the base, and has more than two factors"
            raise Refused("adapter-field-unsupported", what, where=self.where)
        a, b = (factors[f] for f in LORA_PAIR)
        if turned:
            return {LORA_PAIR[0]: tensors.narrow(a, 1, start, length), LORA_PAIR[1]: b}
        return {LORA_PAIR[0]: a, LORA_PAIR[1]: tensors.narrow(b, 0, start, length)}

    def _site(
        self, each: ExpertModule, factors: dict[str, LazyTensor], part: Part, below: LazyTensor, turned: bool
    ) -> Site:
        return Site(
            module=Module(each.name, factors=factors, keys=each.module.keys),
            config=self.config,
            target=part.disk,
            base={"weight": below.info},
            below={"weight": below},
            model_config=self.base.config,
            weight=self.weight,
            numerics=self.numerics,
            where=self.where,
            is_parameter=True,
            turned=turned,
        )
