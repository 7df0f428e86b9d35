"""`gather`: a trainer's state becomes what others load: a model, the adapter that the run trained, or both merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from converter.converters.gather import megatron_lora
from converter.converters.gather.adapter_config import HEADS, LORA_FILES, adapter_config, head_task, with_folded_heads
from converter.converters.gather.autoep import from_autoep
from converter.converters.gather.copies import expect_equal_copies
from converter.converters.gather.megatron import from_megatron
from converter.converters.gather.peft_names import PeftNames, has_factors, peft_names, without_wrappers
from converter.converters.gather.pipeline import from_pipeline
from converter.converters.gather.ties import without_tied_copies
from converter.converters.gather.trainer_names import from_trainer_names
from converter.converters.gather.wrappers import (
    Part,
    Unwrapped,
    expect_known_ends,
    for_value_model,
    unwrap,
    without_foreign_prefix,
)
from converter.converters.merge.adapter_config import read_adapter_config
from converter.converters.merge.adapter_keys import Module
from converter.converters.merge.layer import merged_alone
from converter.converters.merge.merge_lora import MergeLora
from converter.converters.merge.quantised.dequantise import Dequantise
from converter.core.checkpoint import STATE, Checkpoint, Input
from converter.core.context import Context
from converter.core.side_files import recorded
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import Cast, LazyTensor, Stored
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused, UsageError
from converter.families.disk_names import with_disk_names
from converter.families.megatron.names import is_megatron
from converter.families.quantised.reading import Quantised, read
from converter.families.words import PEFT_PREFIX
from converter.text import fold, show

TRAINING = "training"


@dataclass(frozen=True)
class Gather:
    """Make a model or an adapter of a trainer's state.

    Attributes:
        emit: `auto`: an adapter where LoRA was trained, else the model; `merged`: LoRA merged in the same pass;
            `state`: every tensor under the state's own name, which is no model.
        base: the base model: config and tokenizer come from it, and weights that the state does not hold.
        lora_alpha, rslora: for adapters whose config is lost.
        part: which model, where the state holds a policy and a value model.
        dequantize: make the quantised weights below LoRA whole before the merge.
    """

    name: ClassVar[str] = "gather"
    config_will_do: ClassVar[frozenset[str]] = frozenset({"base"})

    emit: Literal["auto", "adapter", "merged", "state"] = "auto"
    base: Input | None = None
    lora_alpha: float | None = None
    rslora: bool = False
    part: Part | None = None
    dequantize: bool = False

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The model, the adapter, or the merged model.

        Raises:
            UsageError: the source is not a trainer's state (`not-training`), alpha is missing (`lora-alpha-unknown`),
                or it holds two models and none is named (`several-parts`).
            Refused: values that are in no file (`zero3-empty-tensors`, `head-base-lost`), no config to go with them
                (`config-missing`), no adapter where one was asked for (`no-adapter`).
        """
        if checkpoint.origin.kind != TRAINING:
            text = "this is not a trainer's state: its weights are gathered already"
            raise UsageError("not-training", text, where=show(checkpoint.origin.asked))
        for said in checkpoint.said:
            context.note("info", "found", said)
        expect_equal_copies(checkpoint, context)
        if self.emit == "state":
            return _state(checkpoint, context)
        keys: dict[str, str] = {}
        if megatron_lora.is_lora(checkpoint.tensors):
            checkpoint, keys = megatron_lora.with_peft_names(checkpoint, self.base, context)
        names, taken = without_wrappers(checkpoint.tensors)
        if taken:
            context.note("info", "wrappers", "taken off the names: " + ", ".join(f"`{show(t)}`" for t in taken))
        inner = unwrap(names, checkpoint, self.part, context)
        _say_masters({n: checkpoint.tensors[n] for n in (*inner.names, *inner.head)}, context)
        if has_factors(inner.names.values()):
            found = peft_names(inner.names, show(checkpoint.origin.asked))
            lora = _Lora(checkpoint, found, context, self.lora_alpha, self.rslora)
            made = lora.merged(self.base, whole=self.dequantize) if self.emit == "merged" else lora.adapter(self.base)
            left = {keys.get(n, n): why for n, why in made.dropped.items()}
            return inner.placed(made.replace(dropped=left), checkpoint.tensors)
        if self.emit == "adapter":
            raise Refused(
                "no-adapter", "the run trained no LoRA: there is no adapter", where=show(checkpoint.origin.asked)
            )
        return inner.placed(_model(checkpoint, inner, self.base, context), checkpoint.tensors)


def _say_masters(found: Mapping[str, LazyTensor], context: Context) -> None:
    casts = {id(t): t for t in found.values() if isinstance(t, Cast)}
    rounded = [t for t in casts.values() if t.source.info.dtype is DType.F32]
    if rounded:
        words = " and ".join(sorted({t.dtype.torch_name for t in rounded}))
        text = f"{len(rounded)} fp32 masters are rounded to {words}, the dtype of training; --master keeps fp32"
        context.note("info", "masters-rounded", text)


def is_placeholder(tensor: LazyTensor) -> bool:
    """True for what ZeRO-3 writes where a parameter was not gathered: `torch.Size([0])`, and no values."""
    return isinstance(tensor, Stored) and tensor.info.shape == (0,)


def _refuse_lost(names: list[str], where: str, next: str) -> None:
    if names:
        raise Refused(
            "zero3-empty-tensors",
            f"{len(names)} tensors are in no file of the checkpoint: {fold(names)}. They were frozen, and saved with "
            "exclude_frozen_parameters",
            where=where,
            next=next,
        )


def _state(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """The tensors as they are, for whoever builds the module: no model, no config, no adapter."""
    held = checkpoint.tensors
    lost = [n for n, t in held.items() if is_placeholder(t)]
    _refuse_lost(lost, show(checkpoint.origin.asked), "look for another checkpoint of the run that was saved with them")
    _say_masters(held, context)
    context.note("info", "state", "a state dict under the names that the run has, for load_state_dict: it is no model")
    origin = dataclasses.replace(checkpoint.origin, kind=STATE)
    return checkpoint.replace(origin=origin, side_files={}, config={}, config_bytes=None, stem=STATE)


def _model(checkpoint: Checkpoint, inner: Unwrapped, base: Checkpoint | None, context: Context) -> Checkpoint:
    asked = show(checkpoint.origin.asked)
    lost = [n for raw, n in (inner.names | inner.head).items() if is_placeholder(checkpoint.tensors[raw])]
    _refuse_lost(lost, asked, "look for another checkpoint of the run that was saved with them")
    found = checkpoint.replace(tensors={raw: checkpoint.tensors[raw] for raw in inner.names}).rename(inner.names)
    found = _with_config(found, base, context)
    if inner.part == "value":
        found = for_value_model(found, base, context)
    if is_megatron(found.tensors):
        found = from_megatron(found, context, base)
    found = from_trainer_names(from_pipeline(from_autoep(found, context), context), context)
    expect_known_ends(found)
    if not inner.is_raw:
        found = without_foreign_prefix(found, context)
        found = with_disk_names(without_tied_copies(found, context), context)
    return _as_model(found)


def _with_config(found: Checkpoint, base: Checkpoint | None, context: Context) -> Checkpoint:
    """Config and side files: the run's own, else the base's."""
    files = {n: f for n, f in found.side_files.items() if n not in LORA_FILES}
    if base is not None:
        files = {**base.side_files, **files}
        aside = {base.origin.path: "only its config and its tokenizer are used: the run has the weights"}
        found = found.replace(set_aside={**found.set_aside, **aside}, inputs={**base.inputs, **found.inputs})
    if found.config:
        return found.replace(side_files=files)
    if base is None:
        raise Refused(
            "config-missing",
            "there is no config.json beside or above the shards, and without it nothing loads the weights",
            where=show(found.origin.asked),
            next=Steps(
                _with(found.origin.asked, "--base", "BASE"),
                ", the model that training began with; for a module of your own, its state dict: ",
                _with(found.origin.asked, "--emit", "state"),
            ),
        )
    context.note("info", "found", f"config.json taken from the base, {show(base.origin.name)}")
    return found.replace(side_files=files, config=base.config, config_bytes=base.config_bytes)


def _as_model(found: Checkpoint) -> Checkpoint:
    return found.replace(origin=dataclasses.replace(found.origin, kind="model"))


@dataclass(frozen=True)
class _Lora:
    """The state of a run that trained LoRA with PEFT."""

    source: Checkpoint
    names: PeftNames
    context: Context
    alpha: float | None
    rslora: bool

    @property
    def where(self) -> str:
        return show(self.source.origin.asked)

    def adapter(self, base: Checkpoint | None, *, alone: bool = True) -> Checkpoint:
        """The adapter as PEFT would have saved it; heads over a frozen random weight are folded and saved whole.

        Args:
            alone: tensors trained beside LoRA must be in it; else they are in the base that it is merged into.
        """
        heads = self._heads_to_fold(base)
        given = self.source.tensors
        lost = [f.key for f in self.names.factors if is_placeholder(given[f.raw])]
        _refuse_lost(lost, self.where, "look for another checkpoint of the run")
        config = adapter_config(self.source, self.names, given, self.alpha, self.context, rslora=self.rslora)
        out = {f.key: given[f.raw] for f in self.names.factors if f.module not in heads}
        if len(out) != sum(f.module not in heads for f in self.names.factors):
            raise Refused("rename-collision", "two tensors would have one name in the adapter", where=self.where)
        out |= self._trained_outside() if alone else {}
        if heads:
            plain = self._checkpoint("adapter", {f.key: given[f.raw] for f in self.names.factors}, config)
            for head in heads:
                out[f"{PEFT_PREFIX}{head}.weight"] = self._folded(head, plain)
            text = f"{fold(heads)} = W0 + BA: W0 was random and frozen, and is in this checkpoint alone; saved whole"
            self.context.note("info", "head-folded", text)
            config = with_folded_heads(config, self.names, heads, task=head_task(self.source))
        frozen = self._frozen_heads(base, heads)
        if frozen:
            out |= {f"{PEFT_PREFIX}{name}": given[raw] for name, raw in frozen.items()}
            modules = list(dict.fromkeys(n.rpartition(".")[0] for n in frozen))
            text = f"{fold(frozen)}: random, frozen, and in this checkpoint alone; saved whole"
            self.context.note("info", "head-kept", text)
            config = with_folded_heads(config, self.names, modules, task=head_task(self.source))
        if base is not None and not config.get("base_model_name_or_path"):
            config = {**config, "base_model_name_or_path": base.origin.asked}
        dropped = dict.fromkeys(self.names.base.values(), "frozen, of the base model: no part of an adapter")
        dropped |= dict.fromkeys(self.names.copies, "the untrained copy of a module that was trained whole")
        used = {self.names.base.get(f"{h}.weight") for h in heads}
        used |= {raw for raw, t in given.items() if any(t is o for o in out.values())}
        kept = {raw: why for raw, why in dropped.items() if given[raw].info.numel and raw not in used}
        found = self._checkpoint("adapter", out, config).replace(dropped={**self.source.dropped, **kept})
        if base is None:
            return found
        aside = {base.origin.path: "an adapter is written; the base is only named in it"}
        return found.replace(set_aside=aside, inputs={**base.inputs, **found.inputs})

    def _trained_outside(self) -> dict[str, LazyTensor]:
        """Trained tensors that are no LoRA: biases belong to an adapter; whole weights have no place in one."""
        trained = self.source.trained or frozenset()
        plain = {name: raw for name, raw in self.names.base.items() if raw in trained}
        weights = [n for n in plain if not n.endswith(".bias")]
        if weights:
            raise Refused(
                "trained-outside",
                f"{len(weights)} weights were trained beside LoRA and can't be part of an adapter: {fold(weights)}",
                where=self.where,
                next=_with(self.source.origin.asked, "--emit", "merged"),
            )
        # PEFT's loader takes a bias under a LoRA layer by this name alone, and drops others without a word.
        layers = {f"{m}.bias": f"{m}.base_layer.bias" for m in self.names.targets}
        return {f"{PEFT_PREFIX}{layers.get(n, n)}": self.source.tensors[raw] for n, raw in plain.items()}

    def _heads_to_fold(self, base: Checkpoint | None) -> list[str]:
        """Task heads with LoRA on them: the weight below is in no base model, so it must be here."""
        found = []
        for module in self.names.targets:
            raw = self.names.base.get(f"{module}.weight")
            if module.rpartition(".")[2] not in HEADS:
                continue
            if base is not None and f"{module}.weight" in base.tensors:
                continue
            if raw is None or is_placeholder(self.source.tensors[raw]):
                raise Refused(
                    "head-base-lost",
                    f"{show(module)} = W0 + BA: W0 was random and frozen, and this checkpoint was saved without frozen "
                    "parameters; no base model contains it",
                    where=self.where,
                    next="look for a checkpoint of the run that was saved with them; without it the head is lost",
                )
            found.append(module)
        return found

    def _frozen_heads(self, base: Checkpoint | None, folded: list[str]) -> dict[str, str]:
        """Tensors of task heads that were not trained, by name: no base model has them, unless the given one does."""
        trained = self.source.trained or frozenset()
        found: dict[str, str] = {}
        for name, raw in self.names.base.items():
            module = name.rpartition(".")[0]
            is_head = module.rpartition(".")[2] in HEADS and raw not in trained
            if not is_head or name in (base.tensors if base else ()) or name in {f"{h}.weight" for h in folded}:
                continue
            if is_placeholder(self.source.tensors[raw]):
                raise Refused(
                    "head-base-lost",
                    f"{show(name)} was frozen, and this checkpoint was saved without frozen parameters",
                    where=self.where,
                    next=Steps(
                        _with(self.source.origin.asked, "--base", "BASE"),
                        ", if the model that training began with has it; if it was random there, look for a checkpoint "
                        "that was saved with it",
                    ),
                )
            found[name] = raw
        return found

    def _folded(self, head: str, plain: Checkpoint) -> LazyTensor:
        parts = {
            f.kind if f.leaf in (None, "weight") else f"{f.kind}.{f.leaf}": self.source.tensors[f.raw]
            for f in self.names.factors
            if f.module == head and f.kind != "modules_to_save"
        }
        weight = self.source.tensors[self.names.base[f"{head}.weight"]]
        module = Module(head, factors=parts)
        return merged_alone(module, {"weight": weight}, read_adapter_config(plain), self.where)["weight"]

    def _checkpoint(self, kind: str, out: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Checkpoint:
        is_verbatim = kind == "adapter" and config == recorded(self.source.side_files)
        files = {n: f for n, f in self.source.side_files.items() if n not in LORA_FILES}
        return Checkpoint(
            tensors=dict(out),
            config=dict(config) if is_verbatim else {**config, "inference_mode": True} if kind == "adapter" else config,
            origin=dataclasses.replace(self.source.origin, kind=kind),
            side_files=files,
            inputs=self.source.inputs,
            checks=self.source.checks,
        )

    def merged(self, base: Checkpoint | None, *, whole: bool = False) -> Checkpoint:
        """The merged model, over the run's own frozen weights where it has them all, else over the base.

        Args:
            whole: what it is merged into is quantised, and made whole first.
        """
        quantised = self._quantised()
        own = self._holds_base() and not (quantised.method and (base is not None or quantised.faults))
        if not own and base is None:
            raise Refused(
                "base-needed",
                "the checkpoint was saved without the frozen weights: the model needs its base",
                where=self.where,
                next=_with(self.source.origin.asked, "--base", "BASE"),
            )
        if not own and base is not None and not base.tensors:
            raise Refused(
                "weights-missing",
                "the checkpoint was saved without the frozen weights, and the base has a config and no weights",
                where=show(base.origin.asked),
                next=Steps(_with(self.source.origin.asked, "--base", "BASE"), ", a folder with its weights"),
            )
        adapter = self.adapter(None if own else base, alone=not own)
        under = base if not own and base is not None else self._own_base(base)
        if not own and quantised.weights and not whole:
            text = f"the run trained over its own quantised weights ({quantised.words}), which --dequantize merges into"
            self.context.note("info", "trained-over", f"{text}; merged onto the base, as it is named")
        under = Dequantise()(under, self.context) if whole else under
        result = MergeLora(adapters=(adapter,))(under, self.context)
        dropped = dict.fromkeys(self.names.copies, "the untrained copy of a module that was trained whole")
        if not own:
            dropped |= dict.fromkeys(self.names.base.values(), "frozen: the base's own is used")
        here = {n: why for n, why in dropped.items() if self.source.tensors[n].info.numel}
        # What is left out of the run's own weights goes by the names that they have in the run.
        left = {self.names.base.get(n, n) if own else n: why for n, why in result.dropped.items()}
        return _as_model(
            result.replace(dropped={**self.source.dropped, **here, **left}, inputs={**adapter.inputs, **result.inputs})
        )

    def _holds_base(self) -> bool:
        raws = [self.names.base.get(f"{m}.weight") for m in self.names.targets]
        held = [raw for raw in self.names.base.values() if is_placeholder(self.source.tensors[raw])]
        return bool(raws) and not held and all(r is not None for r in raws)

    def _quantised(self) -> Quantised:
        """What of the run's own frozen weights is quantised, as QLoRA has them: a base that is named is meant then."""
        own = {name: self.source.tensors[raw].info for name, raw in self.names.base.items()}
        return read(own, self.source.config)

    def _own_base(self, base: Checkpoint | None) -> Checkpoint:
        """The run's frozen weights as a base model; heads come with the adapter."""
        own = {n: self.source.tensors[raw] for n, raw in self.names.base.items() if n.split(".")[0] not in HEADS}
        # Modules that were trained whole are part of the model; the merge puts their trained values in their place.
        whole = {f"{f.module}.{f.leaf}": f.raw for f in self.names.factors if f.kind == "modules_to_save"}
        own |= {n: self.source.tensors[raw] for n, raw in whole.items() if n.split(".")[0] not in HEADS}
        made = dataclasses.replace(self.source.origin, kind="model")
        shared = {raw: n for n, raw in self.names.base.items()}
        ties = tuple(
            tuple(shared[n] for n in group if n in shared)
            for group in self.source.ties
            if sum(n in shared for n in group) > 1
        )
        found = self.source.replace(tensors=own, origin=made, ties=ties, said=(), trained=None)
        self.context.note("info", "base-own", f"merged over the run's own {len(own)} frozen weights")
        model = without_tied_copies(_with_config(found, base, self.context), self.context)
        return with_disk_names(model, self.context)


def _with(asked: str, *options: str) -> Again:
    """The user's command with options."""
    return Again(options, otherwise=Command("gather", (asked, "OUT", *options)))
