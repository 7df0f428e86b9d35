"""The plan of a run's files for another number of ranks: what is written, from what, and what is left behind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.core.checkpoint import SideFile
from converter.core.files.opening import Identity
from converter.core.formats.torch_container import Container
from converter.core.writer.accounting import checks_of
from converter.core.writer.plan import Plan
from converter.core.writer.torch_trees import lay_out_tree
from converter.sources.deepspeed.files import LATEST
from converter.sources.deepspeed.resharding import trees
from converter.sources.deepspeed.resharding.cuts import Rules
from converter.sources.deepspeed.resharding.training import Training, read_training
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards, expect_one_step
from converter.sources.deepspeed.weights import described, training_dtype

MAX_RANKS = 65_536
_RANK = re.compile(r"(?<=zero_pp_rank_)\d+", re.ASCII)


@dataclass(frozen=True)
class Resharded:
    """A plan, and what a screen says of it.

    Attributes:
        format_before, format_after: as `ZeRO-3, 4 ranks`.
        batch: what keeps the run's global batch on the new number of ranks, where its settings say it.
        said: what was chosen, found or left behind.
    """

    plan: Plan
    tag: str
    stage: int
    ranks_before: int
    ranks: int
    format_before: str
    format_after: str
    batch: str | None
    said: tuple[str, ...]


def plan_resharding(
    shards: Shards, ranks: int, *, side_files: Mapping[str, SideFile], inputs: Mapping[str, Identity]
) -> Resharded:
    """Every file of a ZeRO run, for `ranks` ranks.

    Args:
        side_files: what goes beside the tag's folder; `latest` is among what is written.
        inputs: identities of those files.

    Raises:
        Refused: see `read_training`; layouts in which a rank's file holds more than its share (`zero-experts`).
    """
    _expect_plain(shards)
    rules = _rules(shards)
    training = read_training(shards, rules)
    tag = shards.folder.name
    make = _stage_3 if shards.stage == 3 else _stages_1_and_2
    files = make(shards, training, rules, ranks)
    laid_out = tuple(lay_out_tree(f"{tag}/{name}", tree, source) for name, (tree, source) in files.items())
    checks = checks_of((e.tensor for s in laid_out for e in s.entries), shards.checks)
    beside = {**side_files, LATEST: SideFile(content=tag.encode())}
    return Resharded(
        Plan(laid_out, beside, {**inputs, **shards.inputs}, {}, {}, checks=checks),
        tag,
        shards.stage,
        shards.ranks,
        ranks,
        described(shards, shards.stage, shards.ranks),
        described(shards, shards.stage, ranks),
        batch_words(shards.model().get("ds_config"), shards.ranks, ranks),
        tuple(shards.said),
    )


def batch_words(config: Any, before: int, after: int) -> str | None:
    """What keeps a run's global batch on another number of ranks; None where the settings don't say it."""
    config = config if isinstance(config, dict) else {}
    micro, steps = config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps", 1)
    if type(micro) is not int or type(steps) is not int or min(micro, steps) < 1 or before == after:
        return None
    whole = micro * steps * before
    same = f"a step had {whole} rows: {micro} a rank x {steps} accumulated x {before} ranks"
    if whole % (micro * after):
        return f"{same}; no accumulation of {micro} a rank gives as many on {after}"
    return f"{same}; as many on {after} take gradient_accumulation_steps {whole // (micro * after)}"


def _rules(shards: Shards) -> Rules:
    """What the layout depends on, from the settings that the run saved with its state."""
    model = shards.model()
    module = model.get("module")
    first = next((n for g in _groups(model) for n in g), None)
    like = module.get(first) if isinstance(module, dict) else None
    return Rules.of(model.get("ds_config"), training_dtype(shards, like if hasattr(like, "info") else None).bits // 8)


def _groups(model: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    shapes = model.get("param_shapes")
    return [g for g in (shapes if isinstance(shapes, list) else [shapes]) if isinstance(g, dict)]


def _expect_plain(shards: Shards) -> None:
    """Refuse what a rank's file holds beside its share of what all ranks share."""
    model = shards.model()
    if model.get("ds_autoep_layers") or model.get("num_experts") or "ds_zero_partition_groups" in shards.optim(0):
        text = "experts were spread over the ranks, and each rank's file has its own: they can't be cut for others yet"
        raise shards.refuse("zero-experts", text)


def _stage_3(shards: Shards, training: Training, rules: Rules, ranks: int) -> dict[str, tuple[Any, Container]]:
    """Model and optimizer files of each rank. A rank that there was before keeps its buffers; new ones get rank 0's."""
    expect_one_step(shards, shards.files.models)
    files: dict[str, tuple[Any, Container]] = {}
    optimizer = shards.tree(shards.files.optimizers[0])
    for rank in range(ranks):
        own = shards.tree(shards.files.models.get(rank, shards.files.models[0]))
        tree = trees.model_of_stage_3(own.pickle.value, training, rules, ranks, rank)
        files[_of_rank(shards.files.models[0], rank)] = (tree, own)
        tree = trees.optimizer_of_stage_3(optimizer.pickle.value, training, rules, ranks, rank)
        files[_of_rank(shards.files.optimizers[0], rank)] = (tree, optimizer)
    return files


def _stages_1_and_2(shards: Shards, training: Training, rules: Rules, ranks: int) -> dict[str, tuple[Any, Container]]:
    """The model file, and each rank's optimizer file."""
    model, optimizer = shards.tree(shards.model_file()), shards.tree(shards.files.optimizers[0])
    files = {shards.model_file(): (trees.model_of_stages_1_and_2(model.pickle.value, training, rules, ranks), model)}
    is_lean = shards.optimizer != BF16_OPTIMIZER
    for rank in range(ranks):
        tree = trees.optimizer_of_stages_1_and_2(optimizer.pickle.value, training, rules, ranks, rank, is_lean=is_lean)
        files[_of_rank(shards.files.optimizers[0], rank)] = (tree, optimizer)
    return files


def _of_rank(name: str, rank: int) -> str:
    """A rank's file by the name of another rank's."""
    return _RANK.sub(str(rank), name)
