"""What a user may ask of every verb that writes, as plain values. The command line reads them from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from converter.core.writer.reporter import Reporter


class LayoutChoice(StrEnum):
    """How tensors are spread over files; the last two are Megatron's formats."""

    auto = "auto"
    preserve = "preserve"
    pack = "pack"
    torch_dist = "torch_dist"
    legacy = "legacy"


MEGATRON_LAYOUTS = frozenset({LayoutChoice.torch_dist, LayoutChoice.legacy})


class ModulesChoice(StrEnum):
    """Classes of Megatron's that load a checkpoint in its old format."""

    transformer_engine = "transformer-engine"
    grouped = "grouped"
    local = "local"


class CombineChoice(StrEnum):
    """How several adapters become one."""

    sum = "sum"
    cat = "cat"
    linear = "linear"
    svd = "svd"
    ties = "ties"
    magnitude_prune = "magnitude_prune"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"


class NumericsChoice(StrEnum):
    """How a merge rounds."""

    best = "best"
    peft = "peft"


class RequantizeChoice(StrEnum):
    """In which format adapted weights of a quantised base are written back."""

    same = "same"


class EmitChoice(StrEnum):
    """What `gather` writes of a run that trained LoRA."""

    adapter = "adapter"
    merged = "merged"
    both = "both"


class GatherEmit(StrEnum):
    """The same, and the state itself."""

    adapter = "adapter"
    merged = "merged"
    both = "both"
    state = "state"


class PartChoice(StrEnum):
    """Which model of a trainer's state that holds several."""

    policy = "policy"
    value = "value"
    actor = "actor"
    critic = "critic"
    reward = "reward"


class BiasChoice(StrEnum):
    """What happens to a constant of the head that the target has no place for."""

    refuse = "refuse"
    drop = "drop"
    into_mean = "into-mean"


class NormaliserChoice(StrEnum):
    """What happens to mean and std where the target can't keep them."""

    fold = "fold"
    drop = "drop"


class InitChoice(StrEnum):
    """How a fresh head begins."""

    zeros = "zeros"
    normal = "normal"


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What every verb that writes a checkpoint takes.

    Attributes:
        revision: Hub commit, branch or tag of the first input.
        token: Hub token; None: as huggingface_hub finds it.
        dtype: cast every floating-point tensor to it (`bf16`, `fp16`, `fp32`); None: each tensor keeps its own.
        max_shard_size: largest output file, as `5GB`.
        layout: how tensors are spread over files; None: the recipe's, else `auto`.
        link_unchanged: symbolic links to files of the source that stay as they are.
        allow: codes of refusals that the user consented to.
        allow_name: patterns of names of the user's own classes that pickled files may mention; none is imported.
        keep_code: `.py` files of the source travel along.
        jobs: threads; None: one a core.
        memory: to stay under, as `2GB`.
        device: where kernels compute: `cpu`, `cuda`, `cuda:N`, or `auto` for a CUDA device where one is there.
        overwrite: replace an output that this tool made.
        resume: go on where an interrupted run stopped.
        verify: read the output back and compare.
        public: a new repository on the Hub is public.
    """

    revision: str | None = None
    token: str | None = None
    dtype: str | None = None
    max_shard_size: str | None = None
    layout: LayoutChoice | None = None
    link_unchanged: bool = False
    allow: tuple[str, ...] = ()
    allow_name: tuple[str, ...] = ()
    keep_code: bool = False
    jobs: int | None = None
    memory: str | None = None
    device: str = "cpu"
    overwrite: bool = False
    resume: bool = True
    verify: bool = True
    public: bool = False


@dataclass(frozen=True, kw_only=True)
class HeadOptions(WriteOptions):
    """What the verbs that write a head take beside that.

    Attributes:
        source: trainer or dialect of the source; None: inferred from its files.
        head: the linear layer that is the head, where names do not tell; None: inferred.
        base: base of an adapter, or where a missing output embedding is; None: as recorded.
        weights_from: folders in which lost tensors may still be.
        part: which model, where the source is a trainer's state that holds several.
        tag: which checkpoint of a run; None: `latest`.
        lora_alpha: lora_alpha of training, where no config records it.
        dequantize: a quantised model, or the quantised base of an adapter or a run, is made whole first.
        bias: what happens to a constant of the head that the target has no place for.
        normaliser: mean and std: folded into the head, or left out.
        label: take this row of a head with several.
        label_weights: sum the rows of a head with these weights, as `-1,1`.
        init_head: a fresh head where the source has none.
        seed: of `init_head="normal"`.
        tp: tensor-parallel ranks that a vocabulary is padded for, where the trainer's files are padded.
        pp, ep, etp: stages, expert-parallel ranks and ranks of an expert's matrices, for Megatron.
        modules: classes of Megatron's that load its old format.
    """

    source: str | None = None
    head: str | None = None
    base: str | None = None
    weights_from: tuple[str, ...] = ()
    part: str | None = None
    tag: str | None = None
    lora_alpha: float | None = None
    dequantize: bool = False
    bias: str = "refuse"
    normaliser: str = "fold"
    label: int | None = None
    label_weights: str | None = None
    init_head: str | None = None
    seed: int = 0
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    modules: ModulesChoice | None = None


@dataclass(frozen=True)
class Going:
    """How a run goes on, and who hears of it: what is not part of what is written."""

    dry_run: bool = False
    reporter: Reporter | None = None
    executor: Executor | None = None
    on_plan: Callable[[Any], None] | None = None
    told: Callable[[str], None] | None = None
