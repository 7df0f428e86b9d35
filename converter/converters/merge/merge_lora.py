"""`merge-lora`: LoRA, rsLoRA and DoRA adapters folded into the weights of their base.

Every adapter tensor is consumed exactly once and every config field is known, or it stops: PEFT itself skips tensors
that match nothing, and returns the base with exit 0.

Numerics: `best` adds all adapters in fp32 (fp64 for fp32 bases) and rounds once; `peft` is bit-identical to
`merge_and_unload`, also where PEFT rounds twice. Where an adapter touches one side of a tie, both modes untie:
PEFT's merge moves both sides, which is not what the adapter computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from converter.converters.merge.adapter_config import read_adapter_config
from converter.converters.merge.adapter_keys import AdapterModules, Module, read_modules
from converter.converters.merge.carried_heads import carried_files
from converter.converters.merge.embeddings import is_vocabulary, untie, with_prefix, with_vocabulary
from converter.converters.merge.layer import merged, updates_of, with_token_rows
from converter.converters.merge.methods.method import AdapterConfig, Method, Site, Update
from converter.converters.merge.name_rules import AS_IN_BASE, NameRule, find_rule
from converter.converters.merge.task_head import NewHead, add_task_head, expect_head, is_head, is_new_head
from converter.core.checkpoint import Checkpoint, Input, SideFile
from converter.core.context import Context
from converter.core.files.opening import Identity
from converter.core.side_files import adapter_first
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Steps
from converter.errors import Refused, UsageError
from converter.families.memory_names import architectures, classifier
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
    """

    name: ClassVar[str] = "merge-lora"

    adapters: tuple[Input, ...]
    weights: tuple[float, ...] = ()
    numerics: Numerics = "best"
    base_is_residual: bool = False

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
        if self.numerics == "peft" and any(w != 1 for w in weights):
            raise UsageError("weights", "PEFT merges with weight 1 only; use --numerics best with --weight")
        _refuse_quantised(checkpoint)
        merge = _Merge(checkpoint, context, self.numerics)
        for adapter, weight in zip(self.adapters, weights, strict=True):
            merge.add(adapter, float(weight), read_adapter_config(adapter, base_is_residual=self.base_is_residual))
        return merge.result()


def _refuse_quantised(base: Checkpoint) -> None:
    if base.config.get("quantization_config"):
        raise Refused(
            "base-quantised",
            "the base is quantised; a merge needs the 16 or 32 bit weights it was made from",
            where=show(base.origin.asked),
            next=Steps("name the unquantised base: ", Again(("--base", "DIR"))),
        )


@dataclass
class _Merge:
    """Updates of all adapters, collected by base tensor, then applied together so that each is rounded once."""

    base: Checkpoint
    context: Context
    numerics: Numerics
    updates: dict[str, list[Update]] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    token_rows: dict[str, tuple[LazyTensor, tuple[int, ...]]] = field(default_factory=dict)
    heads: list[NewHead] = field(default_factory=list)
    one_sided: set[str] = field(default_factory=set)
    adapters: list[Checkpoint] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    def add(self, adapter: Checkpoint, weight: float, config: AdapterConfig) -> None:
        where = show(adapter.origin.asked)
        read = read_modules(adapter.tensors, where)
        self.adapters.append(adapter)
        trained = classifier(self.base.config, adapter.config)
        new = {n for n, m in read.modules.items() if is_new_head(m, config, self._names(), trained)}
        expect_head(config, bool(new), self.base, trained, where)
        needed = _needed((m for n, m in read.modules.items() if n not in new), config.method)
        rule = self._rule(needed, adapter, where)
        self._say_names(rule, read.stripped)
        self._settle_ties({rule.tensor(f"{module}.{leaf}") for module, leaves in needed.items() for leaf in leaves})
        self.prefix = rule.lacks or self.prefix
        if config.token_indices and all(m.token_rows is None for m in read.modules.values()):
            what = "the config lists trained token rows (trainable_token_indices), and the file holds none"
            raise Refused("adapter-tokens", what, where=where)
        for module in read.modules.values():
            if module.name in new:
                self.heads.append(NewHead(module, config, adapter, trained))
                continue
            self._replace(module, rule, config, where)
            self._token_rows(module, rule.tensor(f"{module.name}.weight"), config, where)
        sites = self._sites(read, new, rule, config, weight, where)
        found = {site.module.name: self._update(site, rule) for site in sites}
        self._refuse_no_op(read, found, config.method, where)

    def _sites(
        self,
        read: AdapterModules,
        new: Collection[str],
        rule: NameRule,
        config: AdapterConfig,
        weight: float,
        where: str,
    ) -> list[Site]:
        """Modules with factors, each with the base's tensors below it."""
        changed = [m for n, m in read.modules.items() if m.factors and n not in new]
        bases = {m.name: self._below(m, rule, config.method) for m in changed}
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
            )
            for m in changed
        ]

    def _below(self, module: Module, rule: NameRule, method: Method) -> dict[str, TensorInfo]:
        """The base's tensors of a module: those that the method needs, and its bias where it has one."""
        found = {leaf: self._stored(rule.tensor(f"{module.name}.{leaf}")).info for leaf in method.leaves(module)}
        bias = rule.tensor(f"{module.name}.bias")
        return {**found, "bias": self.base.tensors[bias].info} if bias in self.base.tensors else found

    def _settle_ties(self, touched: Collection[str]) -> None:
        """A config may tie two tensors that are stored with different values; loaders then do not tie them."""
        for group in self.base.ties:
            stored = [n for n in group if n in self.base.tensors]
            if len(stored) < 2 or not set(group) & set(touched):
                continue
            first = self.base.tensors[stored[0]]
            if not all(self.context.equal(first, self.base.tensors[n]) for n in stored[1:]):
                text = f"{fold(stored)} are tied in config.json and differ in the files; they are kept apart"
                self.context.note("changes-numbers", "tied-differ", text)
                self.base = untie(self.base, stored, self.context)

    def _names(self) -> set[str]:
        """Tensors of the base, those that exist only through a tie included."""
        return set(self.base.tensors) | {name for group in self.base.ties for name in group}

    def _rule(self, needed: Mapping[str, Sequence[str]], adapter: Checkpoint, where: str) -> NameRule:
        classes = architectures(self.base.config, adapter.config)
        stored, tied = self.base.tensors, [n for group in self.base.ties for n in group if n not in self.base.tensors]
        return find_rule(needed, stored, tied, classes, adapter=where, base=show(self.base.origin.asked))

    def _say_names(self, rule: NameRule, stripped: tuple[str, ...]) -> None:
        taken = [s for s in stripped if s != "`base_model.model.`"]
        if taken or rule.words != AS_IN_BASE:
            words = [*(f"{s} taken off" for s in taken), rule.words]
            self.context.note("info", "adapter-names", "adapter names: " + "; ".join(words))

    def _stored(self, name: str) -> LazyTensor:
        """The base's tensor, or the one it is tied to; an adapter's copy of it where there is one."""
        for candidate in (name, *self.base.tied_to(name)):
            if candidate in self.replaced and (candidate == name or candidate not in self.one_sided):
                return self.replaced[candidate]
        for candidate in (name, *self.base.tied_to(name)):
            if candidate in self.base.tensors:
                return self.base.tensors[candidate]
        raise Refused("adapter-unmatched", f"the base has no {show(name)}", where=show(self.base.origin.asked))

    def _replace(self, module: Module, rule: NameRule, config: AdapterConfig, where: str) -> None:
        for leaf, tensor in module.replaced.items():
            name = rule.tensor(f"{module.name}.{leaf}")
            if name in self.replaced:
                raise Refused("adapters-conflict", f"two adapters replace {show(name)}; only one can", where=where)
            old = self._stored(name)
            saved = module.saved or any(_is_below(module.name, m) for m in config.modules_to_save)
            if not (saved or is_vocabulary(name) or (leaf == "bias" and config.bias != "none")):
                raise Refused(
                    "adapter-unexpected",
                    f"{show(module.keys[0])} would replace {show(name)}, and the config does not ask for that",
                    where=where,
                    expected="its module in modules_to_save, an embedding, or a bias with bias=all",
                )
            grows = leaf == "weight" and tensor.info.shape[1:] == old.info.shape[1:] and len(old.info.shape) == 2
            grows = grows and not is_head(name)
            if tensor.info.shape != old.info.shape and not grows:
                raise Refused(
                    "adapter-shape",
                    f"{show(module.keys[0])} does not fit the base's {show(name)}",
                    where=where,
                    expected=str(list(old.info.shape)),
                    got=str(list(tensor.info.shape)),
                )
            if saved and not config.ensure_weight_tying:
                self.one_sided.add(name)
            elif self._has_twin(name, tensor, where):
                self.dropped[module.keys[0]] = f"identical with {show(name)}, to which it is tied"
                continue
            self.replaced[name] = tensors.cast(tensor, old.info.dtype)
            members = (name,) if name in self.one_sided else (name, *self.base.tied_to(name))
            self.dropped |= {n: "replaced by the adapter's own" for n in members if n in self.base.tensors}

    def _has_twin(self, name: str, tensor: LazyTensor, where: str) -> bool:
        """True where the adapter has the tensor a second time, as its tied partner.

        Raises:
            Refused: the two differ, though the model has one tensor (`tied-copies-differ`).
        """
        twins = [n for n in self.base.tied_to(name) if n in self.replaced and n not in self.one_sided]
        for twin in twins:
            if not self.context.equal(tensors.cast(tensor, self.replaced[twin].info.dtype), self.replaced[twin]):
                what = f"{show(name)} and {show(twin)} are one tensor in the base, and the adapter's copies differ"
                raise Refused("tied-copies-differ", what, where=where)
        return bool(twins)

    def _token_rows(self, module: Module, name: str, config: AdapterConfig, where: str) -> None:
        rows = module.token_rows
        if rows is None:
            return
        indices = config.token_indices.get("", ())
        for key, listed in config.token_indices.items():
            if key and _names_module(module.name, key):
                indices = listed
        if len(indices) != rows.info.shape[0] or len(set(indices)) != len(indices):
            raise Refused(
                "adapter-tokens",
                f"{show(module.keys[0])} has {rows.info.shape[0]} rows, the config lists {len(indices)} token indices",
                where=where,
            )
        if name in self.token_rows:
            raise Refused("adapters-conflict", f"two adapters train rows of {show(name)}", where=where)
        self.token_rows[name] = (rows, indices)

    def _update(self, site: Site, rule: NameRule) -> tuple[Update, ...]:
        updates = updates_of(site)
        if len(self.adapters) > 1 and any(u.start is not None for u in updates):
            raise Refused(
                "adapters-conflict", "PiSSA and OLoRA move the base and can't be merged with others", where=site.where
            )
        for update in updates:
            self.updates.setdefault(rule.tensor(f"{site.module.name}.{update.leaf}"), []).append(update)
        return updates

    def _refuse_no_op(
        self, read: AdapterModules, found: Mapping[str, Sequence[Update]], method: Method, where: str
    ) -> None:
        begun = {n: [f for f in method.zeros if f in read.modules[n].factors] for n in found}
        names = list(dict.fromkeys(f for factors in begun.values() for f in factors))
        what = " and ".join(names)
        zero = [
            name
            for name, factors in begun.items()
            if factors and all(self.context.is_zero(read.modules[name].factors[f]) for f in factors)
        ]
        scales = [update.scale for updates in found.values() for update in updates]
        if scales and not any(scales):
            text = "lora_alpha or the weight is 0: every update is zero, and the result would be the base"
            self.context.consent(Refused("no-op", text, where=where, next="set the alpha that training used"))
        elif found and len(zero) == len(found):
            count = f"{len(zero)} of {len(found)}"
            text = f"every {what} is zero ({count}): the adapter was never trained, the result would be the base"
            self.context.consent(Refused("no-op", text, where=where, next="look for a later checkpoint of the run"))
        elif zero:
            text = f"{len(zero)} of {len(found)} {what} are zero: {fold(zero)}"
            self.context.note("info", "zero-lora-b", text)

    def result(self) -> Checkpoint:
        out: dict[str, LazyTensor] = dict(self.base.tensors)
        untied: list[str] = []
        for name in dict.fromkeys([*self.replaced, *self.token_rows, *self.updates]):
            tensor = self._merged(name)
            partners = self.base.tied_to(name)
            if not partners:
                out[name] = tensor
            elif name in self.updates or name in self.one_sided:
                untied.append(name)
                out[name] = tensor
                for partner in partners:
                    if partner not in self.updates and partner not in self.replaced:
                        out[partner] = self._partner(name, partner)
            else:
                for member in (name, *partners):
                    if member in out:
                        out[member] = tensor
        beside, replaced = carried_files(self.base, self.adapters, self.context)
        checkpoint = self.base.replace(
            tensors=out,
            beside=beside,
            inputs=self._inputs(),
            checks=self.base.checks + tuple(c for adapter in self.adapters for c in adapter.checks),
            side_files=self._side_files(),
            dropped=dict(self.base.dropped) | self.dropped | replaced,
        )
        checkpoint = untie(checkpoint, untied, self.context) if untied else checkpoint
        checkpoint = with_vocabulary(checkpoint, self.base)
        if self.heads:
            checkpoint = add_task_head(
                checkpoint,
                self.heads,
                self.context,
                prefix=self.prefix,
                touched={*self.updates, *self.replaced},
                cast_to_base=self.numerics == "peft",
            )
        elif self.prefix and any(n for n in out if n not in self.base.tensors):
            checkpoint = with_prefix(checkpoint, self.prefix, set(self.base.tensors))
        return checkpoint

    def _partner(self, name: str, partner: str) -> LazyTensor:
        """The other side of a tie that comes apart: as it was, but for copies and rows that belong to both."""
        stored = self._stored(partner) if partner not in self.one_sided else self.replaced[partner]
        rows = self.token_rows.get(partner) or self.token_rows.get(name)
        return with_token_rows(stored, *rows) if rows else stored

    def _merged(self, name: str) -> LazyTensor:
        weight = self._stored(name)
        if name in self.updates:
            weight = merged(weight, self.updates[name], self.numerics)
        rows = self.token_rows.get(name)
        return with_token_rows(weight, *rows) if rows else weight

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


def _needed(modules: Iterable[Module], method: Method) -> dict[str, list[str]]:
    """The tensors, by module, that the base must have: what is updated or replaced."""
    needed: dict[str, list[str]] = {}
    for module in modules:
        changed = (
            *(method.leaves(module) if module.factors else ()),
            *(("weight",) if module.token_rows is not None else ()),
        )
        needed[module.name] = list(dict.fromkeys([*module.replaced, *changed]))
    return needed


def _names_module(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _is_below(module: str, name: str) -> bool:
    """True for a module that modules_to_save names, and for what is inside one; PEFT compares the names' ends."""
    pieces = module.split(".")
    return any(".".join(pieces[:n]).endswith(name) for n in range(1, len(pieces) + 1))
