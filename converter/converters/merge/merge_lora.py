"""`merge-lora`: LoRA, rsLoRA and DoRA adapters folded into the weights of their base.

Every adapter tensor is consumed exactly once and every config field is known, or it stops: PEFT itself skips tensors
that match nothing, and returns the base with exit 0.

Numerics: `best` adds all adapters in fp32 (fp64 for fp32 bases) and rounds once; `peft` is bit-identical to
`merge_and_unload`, also where PEFT rounds twice. Where an adapter touches one side of a tie, both modes untie:
PEFT's merge moves both sides, which is not what the adapter computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from converter.converters.merge.adapter_config import read_adapter_config
from converter.converters.merge.adapter_keys import AdapterModules, Module, read_modules
from converter.converters.merge.adapter_values import expect_finite, with_alpha
from converter.converters.merge.as_loaded import as_loaded
from converter.converters.merge.attention import Attention, as_modules
from converter.converters.merge.carried_heads import carried_files
from converter.converters.merge.combining import Combination, How, in_order
from converter.converters.merge.embeddings import expect_no_scale, untie, with_prefix, with_vocabulary
from converter.converters.merge.expert_sites import ExpertSites
from converter.converters.merge.experts import find_experts, is_parameter
from converter.converters.merge.foreign_adapters import plain_names
from converter.converters.merge.layer import merged, updates_of, with_token_rows
from converter.converters.merge.methods.method import AdapterConfig, Method, Site, Update
from converter.converters.merge.name_rules import AS_IN_BASE, Biases, NameRule, find_rule
from converter.converters.merge.quantised_base import over_quantised
from converter.converters.merge.remote_code import tell_of_code
from converter.converters.merge.replicated import replicated
from converter.converters.merge.saved_twice import without_second_copies
from converter.converters.merge.task import with_task
from converter.converters.merge.task_head import NewHead, add_task_head, expect_head, is_new_head
from converter.converters.merge.trained_biases import expect_biases
from converter.converters.merge.trained_files import (
    expect_nothing_unread,
    trained_files,
    with_trained_files,
    without_trained_files,
)
from converter.converters.merge.whole_tensors import WholeTensors, is_same, stored
from converter.core.checkpoint import Checkpoint, Input, SideFile
from converter.core.context import Context
from converter.core.files.opening import Identity
from converter.core.side_files import adapter_first
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.families.memory_names import Architecture, architectures, classifier
from converter.text import fold, show

Numerics = Literal["best", "peft"]


@dataclass(frozen=True)
class MergeLora:
    """Merge adapters into the checkpoint that flows through.

    Attributes:
        adapters: opened adapter checkpoints.
        weights: a factor for each adapter's update, in order; empty: 1 each.
        numerics: `best` or `peft`.
        base_is_residual: the base is already the one that a PiSSA or OLoRA start left; do not move it again.
        lora_alpha: the alpha of training, for adapters that record none or 0.
        combine: how several adapters become one: `sum`, which is exact, or one of PEFT's ways.
        density: the share of elements that `ties`, `magnitude_prune` and `dare_*` keep.
        svd_rank: of what `svd` gives; 0: the largest rank of the adapters.
        seed: of what `dare_*` draws.
        majority_sign: `total` or `frequency`, for `ties`.
        requantize: `same` writes adapted weights that are quantised back in their own format.
    """

    name: ClassVar[str] = "merge-lora"

    adapters: tuple[Input, ...]
    weights: tuple[float, ...] = ()
    numerics: Numerics = "best"
    base_is_residual: bool = False
    lora_alpha: float | None = None
    combine: How = "sum"
    density: float | None = None
    svd_rank: int = 0
    seed: int = 0
    majority_sign: Literal["total", "frequency"] = "total"
    requantize: Literal["same"] | None = None

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The merged checkpoint.

        Raises:
            Refused: an adapter does not fit the base, is incomplete, or would change nothing.
            UsageError: weights that do not go with the adapters.
        """
        if not self.adapters:
            raise UsageError("no-adapter", "merge-lora needs an adapter")
        weights = self.weights or (1.0,) * len(self.adapters)
        if len(weights) != len(self.adapters):
            raise UsageError("weights", f"{len(weights)} weights were given for {len(self.adapters)} adapters")
        combination = Combination(self.combine, self.density, self.svd_rank, self.seed, self.majority_sign)
        combination.expect_sound()
        if self.numerics == "peft" and self.combine == "sum" and any(w != 1 for w in weights):
            raise UsageError("weights", "PEFT merges with weight 1 only; use --numerics best with --weight")

        def merge(base: Checkpoint) -> Checkpoint:
            return self._merged(base, weights, combination, context)

        return over_quantised(checkpoint, self.adapters, context, merge, back=self.requantize is not None)

    def _merged(
        self, checkpoint: Checkpoint, weights: Sequence[float], combination: Combination, context: Context
    ) -> Checkpoint:
        tell_of_code(checkpoint, context)
        adapters = [with_task(a, checkpoint) for a in with_alpha(self.adapters, self.lora_alpha)]
        configs = [read_adapter_config(a, base_is_residual=self.base_is_residual) for a in adapters]
        loaded = as_loaded(replicated(checkpoint, configs, context), adapters)
        attention = as_modules(loaded.base, adapters, self.numerics)
        checkpoint, adapters = attention.base, list(attention.adapters)
        combination = combination.over(configs, [show(a.origin.asked) for a in adapters])
        for group in in_order(adapters, configs, context):
            merge = _Merge(checkpoint, context, self.numerics, combination, attention)
            for at in group:
                merge.add(adapters[at], float(weights[at]), configs[at])
            checkpoint = merge.result()
        return loaded.restored(attention.restored(checkpoint))


@dataclass
class _Merge:
    """Updates of all adapters, collected by base tensor, then applied together so that each is rounded once."""

    base: Checkpoint
    context: Context
    numerics: Numerics
    combination: Combination
    attention: Attention
    updates: dict[str, list[Update]] = field(default_factory=dict)
    heads: list[NewHead] = field(default_factory=list)
    adapters: list[Checkpoint] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    def __post_init__(self) -> None:
        self.whole = WholeTensors(self.context)
        self.biases = Biases(self.base.config, tuple(self.base.tensors))

    def add(self, adapter: Checkpoint, weight: float, config: AdapterConfig) -> None:
        where = show(adapter.origin.asked)
        expect_finite(adapter, self.context)
        held, said = plain_names(adapter.tensors, where)
        expect_nothing_unread(adapter, self.context)
        files = trained_files(adapter)
        read, twice = without_second_copies(read_modules(held, where), self.context, where)
        read, self.dropped = with_trained_files(read, files, where), self.dropped | twice
        self.adapters.append(without_trained_files(adapter))
        names, trained = self._names(), classifier(self.base.config, adapter.config)
        new = {n for n, m in read.modules.items() if is_new_head(m, config, names, trained)}
        expect_head(config, bool(new), self.base, trained, where)
        classes = architectures(self.base.config, adapter.config)
        experts = find_experts(read.modules, self.base.tensors, classes, adapter.config, where)
        apart = new | experts.found.keys()
        needed = _needed((m for n, m in read.modules.items() if n not in apart), config.method)
        rule = self._rule(needed, classes, where, files)
        self._say_names(rule, (*read.stripped, *said))
        experts.tell(self.context)
        self._settle_ties({rule.tensor(f"{module}.{leaf}") for module, leaves in needed.items() for leaf in leaves})
        self.prefix = rule.lacks or self.prefix
        if config.token_indices and all(m.token_rows is None for m in read.modules.values()):
            what = "the config lists trained token rows (trainable_token_indices), and the file holds none"
            raise Refused("adapter-tokens", what, where=where)
        for module in read.modules.values():
            if module.name in new:
                self._add_head(NewHead(module, config, adapter, trained), where)
            elif module.name not in apart:
                self.whole.add(self.base, module, rule, config, where)
        self.whole.add_rows(self.base, (m for n, m in read.modules.items() if n not in apart), rule, config, where)
        parameters = {n for n in read.modules if is_parameter(n, adapter.config, classes)} | self.attention.inputs
        sites = self._sites(read, apart, parameters, rule, config, weight, where)
        expect_biases(sites, config, self.context, where, own=adapter.origin.path == self.base.origin.path)
        found = {site.module.name: self._update(site, rule) for site in sites}
        over = ExpertSites(self.base, config, adapter.config, weight, self.numerics, where)
        for name, disk, update in over.updates(experts.found):
            self.updates.setdefault(disk, []).append(update)
            found[name] = (*found.get(name, ()), update)
        self._settle_shared(read, adapter, where)
        self._refuse_no_op(read, found, config.method, where)

    def _sites(
        self,
        read: AdapterModules,
        apart: Collection[str],
        parameters: Collection[str],
        rule: NameRule,
        config: AdapterConfig,
        weight: float,
        where: str,
    ) -> list[Site]:
        """Modules with factors, each with the base's tensors below it."""
        changed = [
            self._without_training(m, config.method) for n, m in read.modules.items() if m.factors and n not in apart
        ]
        below = {m.name: self._below(m, rule, config.method) for m in changed}
        bases = {name: {leaf: x.info for leaf, x in held.items()} for name, held in below.items()}
        peers = {name: base["weight"] for name, base in bases.items() if "weight" in base}
        return [
            Site(
                module=m,
                config=config,
                target=rule.tensor(f"{m.name}.weight"),
                base=bases[m.name],
                model_config=self.base.config,
                weight=weight,
                numerics=self.numerics,
                where=where,
                shared=read.shared,
                peers=peers,
                is_parameter=m.name in parameters,
                below=below[m.name],
            )
            for m in changed
            for _ in range(1 + (m.name in self.attention.outputs))
        ]

    def _without_training(self, module: Module, method: Method) -> Module:
        """A module without the factors that only training reads."""
        if not (left := {name for name in module.factors if name.partition(".")[0] in method.training}):
            return module
        keys = {id(t): key for adapter in self.adapters for key, t in adapter.tensors.items()}
        self.dropped |= {keys[id(module.factors[n])]: f"only the training of {method.title} reads it" for n in left}
        return replace(module, factors={n: t for n, t in module.factors.items() if n not in left})

    def _below(self, module: Module, rule: NameRule, method: Method) -> dict[str, LazyTensor]:
        """The base's tensors of a module: those that the method needs, and its bias where it has one."""
        found = {
            leaf: self.whole.root(self.base, rule.tensor(f"{module.name}.{leaf}")) for leaf in method.leaves(module)
        }
        bias = self.biases.on_disk(f"{module.name}.bias", rule)
        is_there = any(n in self.base.tensors for n in (bias, *self.base.tied_to(bias)))
        return {**found, "bias": stored(self.base, bias)} if is_there else found

    def _settle_ties(self, touched: Collection[str]) -> None:
        """A config may tie two tensors that are stored with different values; loaders then do not tie them."""
        for group in self.base.ties:
            stored = [n for n in group if n in self.base.tensors]
            if len(stored) < 2 or not set(group) & set(touched):
                continue
            first = self.base.tensors[stored[0]]
            if not all(self.context.equal(first, self.base.tensors[n]) for n in stored[1:]):
                expect_no_scale(self.base, stored)
                text = f"{fold(stored)} are tied in config.json and differ in the files; they are kept apart"
                self.context.note("changes-numbers", "tied-differ", text)
                self.base = untie(self.base, stored, self.context)

    def _names(self) -> set[str]:
        """Tensors of the base, those that exist only through a tie included."""
        return set(self.base.tensors) | {name for group in self.base.ties for name in group}

    def _rule(
        self, needed: Mapping[str, Sequence[str]], classes: Sequence[Architecture], where: str, files: Collection[str]
    ) -> NameRule:
        stored, tied = self.base.tensors, [n for group in self.base.ties for n in group if n not in self.base.tensors]
        try:
            return find_rule(needed, stored, tied, classes, adapter=where, base=show(self.base.origin.asked))
        except Refused as error:
            if files:
                error.what += f" (the adapter's, and those of {fold(files)} beside it)"
            raise

    def _say_names(self, rule: NameRule, stripped: tuple[str, ...]) -> None:
        taken = [s for s in stripped if s != "`base_model.model.`"]
        if taken or rule.words != AS_IN_BASE:
            words = [*(f"{s} taken off" if s.endswith("`") else s for s in taken), rule.words]
            self.context.note("info", "adapter-names", "adapter names: " + "; ".join(words))

    def _add_head(self, head: NewHead, where: str) -> None:
        """A head that the base lacks; what PEFT keeps below the trained one is not needed."""
        self.heads.append(head)
        self.whole.settle_copies(head.module, where)
        frozen = [u for leaf in head.module.whole if (u := head.module.under(leaf)) is not None]
        self.dropped |= {key: "the head as it was before training" for key, _ in frozen}

    def _update(self, site: Site, rule: NameRule) -> tuple[Update, ...]:
        updates = updates_of(site)
        if site.target in self.whole.own:
            # PEFT loads the adapter's own copy of the weight over the one that it has moved: that one is moved already.
            updates = tuple(replace(update, start=None) for update in updates)
        if len(self.adapters) > 1 and any(u.start is not None for u in updates):
            raise Refused(
                "adapters-conflict", "PiSSA and OLoRA move the base and can't be merged with others", where=site.where
            )
        for update in updates:
            name = self.biases.on_disk(f"{site.module.name}.{update.leaf}", rule)
            self.updates.setdefault(name, []).append(update)
        return updates

    def _settle_shared(self, read: AdapterModules, adapter: Checkpoint, where: str) -> None:
        """What the adapter has for the model, and once more for each layer (RandLoRA's bases), must be the same."""
        for name, tensor in read.shared.items():
            copies = [m.factors[name] for m in read.modules.values() if name in m.factors]
            if not all(is_same(self.context, tensor, copy) for copy in copies):
                what = f"{show(name)} of the model and that of a layer differ, and they are one tensor"
                raise Refused("adapter-key-twice", what, where=where)
            keys = [key for key, held in adapter.tensors.items() if held is tensor] if copies else []
            self.dropped |= dict.fromkeys(keys, "identical with what its layers have")

    def _refuse_no_op(
        self, read: AdapterModules, found: Mapping[str, Sequence[Update]], method: Method, where: str
    ) -> None:
        begun = {n: [f for f in method.zeros if f in read.modules[n].factors] for n in found}
        what = " and ".join(dict.fromkeys(f for factors in begun.values() for f in factors))
        with self.context.keeping_open():
            zero = [
                name
                for name, factors in begun.items()
                if factors and all(self.context.is_zero(read.modules[name].factors[f]) for f in factors)
            ]
        scales = [update.scale for updates in found.values() for update in updates]
        if scales and not any(scales):
            text = "lora_alpha or the weight is 0: every update is zero, and the result would be the base"
            self.context.consent(Refused("no-op", text, where=where, next=_alpha_again(where)))
        elif found and len(zero) == len(found):
            count = f"{len(zero)} of {len(found)}"
            text = f"every {what} is zero ({count}): the adapter was never trained, the result would be the base"
            self.context.consent(Refused("no-op", text, where=where, next="look for a later checkpoint of the run"))
        elif zero:
            text = f"{len(zero)} of {len(found)} {what} are zero: {fold(zero)}"
            self.context.note("info", "zero-lora-b", text)

    def result(self) -> Checkpoint:
        out, built = dict(self.base.tensors), dict[str, None]()
        untied: list[str] = []
        for name in dict.fromkeys([*self.whole.own, *self.whole.rows, *self.updates]):
            group = [name, *self.base.tied_to(name)]
            if not any(n in built for n in group):
                apart = any(n in self.updates for n in group) or not self.whole.is_tied_still(self.base, group)
                members = group if apart else [name]
                built |= dict.fromkeys(members)
                untied += group if apart and len(group) > 1 else []
                values = {n: self._merged(n) for n in members}
                out |= values if apart else {n: values[name] for n in group if n in out or len(group) == 1}
        beside, replaced = carried_files(self.base, self.adapters, self.context)
        checkpoint = self.base.replace(
            tensors=out,
            beside=beside,
            inputs=self._inputs(),
            checks=self.base.checks + tuple(c for adapter in self.adapters for c in adapter.checks),
            side_files=self._side_files(),
            dropped={**self.base.dropped, **self.dropped, **self.whole.left_out(self.base, built), **replaced},
        )
        checkpoint = untie(checkpoint, untied, self.context) if untied else checkpoint
        if self.heads:
            checkpoint = add_task_head(
                checkpoint,
                self.heads,
                self.context,
                prefix=self.prefix,
                touched={*self.updates, *self.whole.own},
                cast_to_base=self.numerics == "peft",
            )
        elif self.prefix and any(n for n in out if n not in self.base.tensors):
            checkpoint = with_prefix(checkpoint, self.prefix, set(self.base.tensors))
        return with_vocabulary(checkpoint, self.base, self.prefix)

    def _merged(self, name: str) -> LazyTensor:
        weight = self.whole.root(self.base, name)
        if name in self.updates:
            updates = self.combination.of(self.updates[name], name, self.numerics)
            weight = merged(weight, updates, self.numerics)
        rows = self.whole.rows_of(self.base, name)
        return with_token_rows(weight, rows.rows, rows.indices) if rows else weight

    def _side_files(self) -> dict[str, SideFile]:
        """The tokenizer is the first adapter's that brings one; everything else the base's."""
        files = dict(self.base.side_files)
        for adapter in reversed(self.adapters):
            files = adapter_first(files, adapter.side_files)
        return files

    def _inputs(self) -> dict[str, Identity]:
        merged: dict[str, Identity] = dict(self.base.inputs)
        for adapter in self.adapters:
            merged |= adapter.inputs
        return merged


def _alpha_again(where: str) -> Again:
    """The same command with the alpha that training used."""
    merge = Command("merge-lora", (where, "OUT", "--lora-alpha", "N"))
    return Again(("--lora-alpha", "N"), otherwise=merge)


def _needed(modules: Iterable[Module], method: Method) -> dict[str, list[str]]:
    """The tensors, by module, that the base must have: what is updated or replaced."""
    needed: dict[str, list[str]] = {}
    for module in modules:
        leaves = [*(method.leaves(module) if module.factors else ()), *["weight"] * (module.token_rows is not None)]
        needed[module.name] = list(dict.fromkeys([*module.replaced, *leaves]))
    return needed
