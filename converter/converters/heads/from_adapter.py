"""A reward model that is an adapter over a base: merged, with its head from wherever the trainer left that."""

from __future__ import annotations

from converter.converters.heads.detect import head_like
from converter.converters.heads.fit import Wishes
from converter.converters.merge.adapter_config import read_adapter_config
from converter.converters.merge.adapter_keys import Module, read_modules
from converter.converters.merge.layer import merged_alone
from converter.converters.merge.merge_lora import MergeLora
from converter.converters.merge.methods.method import AdapterConfig
from converter.converters.merge.trained_files import trained_files, without_trained_files
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.families.adapter_task import TASK_SUFFIX, task_of_class
from converter.text import fold, show

NO_CURE = "ignore_mismatched_sizes and zero-filling give another model"


def with_adapter(base: Checkpoint, adapter: Checkpoint, wishes: Wishes, context: Context) -> Checkpoint:
    """The base with the adapter merged in, and the head beside it.

    PEFT knows a head only with `task_type`; OpenRLHF and SkyRL train without one, TRL and LLaMA-Factory keep the head
    in a file of its own.

    Raises:
        Refused: a LoRA on a head whose own weight is nowhere (`head-base-lost`); whatever a merge refuses.
    """
    where = show(adapter.origin.asked)
    adapter = _without_class(adapter)
    read = read_modules(adapter.tensors, where)
    heads = {n: m for n, m in read.modules.items() if head_like([f"{n}.weight"])}
    lost = [n for n, m in heads.items() if m.factors and "weight" not in m.replaced and not _is_in(base, n)]
    dropped: dict[str, str] = {}
    if lost:
        if wishes.init == "none":
            raise lost_base(lost[0], adapter)
        why = "LoRA on a head whose own weight is lost; --init-head draws a fresh one"
        dropped = {key: why for n in lost for key in heads[n].keys}
    apart: dict[str, LazyTensor] = {}
    taken: set[str] = set(dropped)
    if adapter.config.get("task_type") not in TASK_SUFFIX:
        config = read_adapter_config(adapter)
        for name, module in heads.items():
            if name not in lost and not _is_in(base, name):
                apart |= _tensors(module, config, where)
                taken |= set(module.keys)
    rest = adapter.replace(
        tensors={n: t for n, t in adapter.tensors.items() if n not in taken}, beside=trained_files(adapter)
    )
    merged = MergeLora(adapters=(rest,))(base, context) if rest.tensors else _with_files(base, adapter)
    if apart:
        context.note("info", "head", f"{fold(apart)} from the adapter")
    return merged.replace(
        tensors={**merged.tensors, **apart},
        beside={**merged.beside, **without_trained_files(adapter).beside},
        dropped={**adapter.dropped, **merged.dropped, **dropped},
        set_aside={**adapter.set_aside, **merged.set_aside},
        inputs={**adapter.inputs, **merged.inputs},
        repaired={**adapter.repaired, **merged.repaired},
    )


def _without_class(adapter: Checkpoint) -> Checkpoint:
    """The adapter without the classification class that it names: here the head is taken apart, wherever it lies."""
    if adapter.config.get("task_type") or task_of_class(adapter.config) is None:
        return adapter
    return adapter.replace(config={k: v for k, v in adapter.config.items() if k != "auto_mapping"})


def _is_in(base: Checkpoint, module: str) -> bool:
    return f"{module}.weight" in base.tensors


def _with_files(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """An adapter of a head alone leaves the base as it is."""
    return base.replace(inputs={**base.inputs, **adapter.inputs})


def _tensors(module: Module, config: AdapterConfig, where: str) -> dict[str, LazyTensor]:
    """A head that the adapter holds whole; LoRA over it is folded in."""
    return {f"{module.name}.{leaf}": t for leaf, t in merged_alone(module, module.replaced, config, where).items()}


_OF_THE_RUN = Command("gather", ("RUN/global_stepN", "OUT"))


def lost_base(module: str, adapter: Checkpoint) -> Refused:
    """The refusal of a LoRA over a head that was random, frozen and never saved: what would bring it back, in order."""
    return Refused(
        "head-base-lost",
        f"{show(module)} = W0 + BA: BA is in the adapter; W0 was random, frozen and never saved. No base model "
        "contains it",
        where=show(adapter.origin.asked),
        expected="W0, from a DeepSpeed checkpoint of the run (frozen_param_fragments: exact), or another checkpoint "
        f"that has the head whole. {NO_CURE}",
        next=Steps(
            Again(("--weights-from", "RUN/global_stepN"), otherwise=_OF_THE_RUN),
            ", the run's DeepSpeed folder; or for a fresh critic, never a reward model, ",
            Again(("--init-head", "zeros")),
        ),
    )


def no_head(checkpoint: Checkpoint, adapter: Checkpoint | None) -> Refused:
    """The refusal of a source without any head."""
    source = adapter or checkpoint
    held = "neither the adapter, the files beside it nor the base has a head" if adapter else "there is no head here"
    return Refused(
        "head-missing",
        f"{held}: the trainer would begin with a random one, and at most warn",
        where=show(source.origin.asked),
        expected="a score, value_head or v_head among the weights, or value_head.safetensors beside them"
        + ("" if adapter else "; Nemotron's reward models have theirs in lm_head (--from lm-head-row0)"),
        next=Steps(
            "look for the head in the run's shards (global_step*), which `gather` reads, or in another checkpoint of "
            "the run; for a fresh critic, never a reward model, ",
            Again(("--init-head", "zeros")),
            ", or --init-head normal --seed 0",
        ),
    )
