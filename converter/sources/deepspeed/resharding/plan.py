"""The plan of a run's files for another number of ranks: what is written, from what, and what is left behind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.core.checkpoint import SideFile
from converter.core.files.opening import Identity
from converter.core.formats.torch_container import Container
from converter.core.formats.torch_tree import changed
from converter.core.writer.accounting import checks_of
from converter.core.writer.plan import Plan
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.torch_trees import lay_out_any
from converter.sources.deepspeed.files import LATEST
from converter.sources.deepspeed.resharding import plain, stages, trees
from converter.sources.deepspeed.resharding.cuts import Rules
from converter.sources.deepspeed.resharding.kept import kept_of
from converter.sources.deepspeed.resharding.parts import (
    data_ranks,
    expect_whole_sets,
    kept_files,
    parts_of,
    split_words,
)
from converter.sources.deepspeed.resharding.training import Training, read_training
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards, expect_one_step
from converter.sources.deepspeed.weights import described, training_dtype
from converter.sources.deepspeed.whole import expect_not_split, is_pipeline, is_sliced
from converter.sources.resharded import Resharded

MAX_RANKS = 65_536
_RANK = re.compile(r"(?<=zero_pp_rank_)\d+", re.ASCII)
_PREFIX = re.compile(r"(?:bf16_)?zero_pp_rank_\d+_", re.ASCII)


def plan_resharding(
    shards: Shards,
    ranks: int | None,
    *,
    stage: int | None = None,
    side_files: Mapping[str, SideFile],
    inputs: Mapping[str, Identity],
) -> Resharded:
    """Every file of a ZeRO run, for `ranks` ranks.

    Args:
        ranks: all of them, those that split layers or tensors included; None: as many as before.
        stage: None: that of the run.
        side_files: what goes beside the tag's folder; `latest` is among what is written.
        inputs: identities of those files.

    Raises:
        UsageError: a number of ranks that doesn't fit how the run is split (`usage`).
        Refused: see `read_training`; layouts in which a rank's file holds more than its share (`zero-experts`).
    """
    if stage not in (None, shards.stage):
        expect_not_split(shards, "another stage of ZeRO")
    if shards.universal:
        expect_not_split(shards, "a file for each rank")
    parts = parts_of(shards)
    each = None if ranks is None else data_ranks(shards, ranks)
    runs = [read_run(part, each, stage) for part in parts]
    tag = shards.folder.name.removesuffix("_universal") if shards.universal else shards.folder.name
    each, stage = runs[0].ranks, runs[0].stage
    expect_whole_sets(shards, each)
    kept = {f"{tag}/{n}": f for n, f in kept_files(shards, parts).items()}
    laid_out, small = laid_out_files(tag, {name: tree for run in runs for name, tree in _files(run).items()})
    checks = checks_of((e.tensor for s in laid_out for e in s.entries), shards.checks)
    beside = {**side_files, **kept, **small, LATEST: SideFile(content=tag.encode())}
    split = split_words(shards, parts)
    return Resharded(
        Plan(tuple(laid_out), beside, {**inputs, **shards.inputs}, {}, {}, checks=checks),
        tag,
        stage,
        shards.ranks * len(parts),
        each * len(parts),
        described(shards, shards.stage, shards.ranks) + split,
        described(shards, stage, each) + split,
        batch_words(shards.model().get("ds_config"), shards.ranks, each),
        tuple(shards.said),
        'engine.load_checkpoint("{out}")',
        shards.digest,
    )


def laid_out_files(tag: str, files: Mapping[str, tuple[Any, Container]]) -> tuple[list[ShardPlan], dict[str, SideFile]]:
    """Files of a tag's folder by name, as a plan has them; those without a tensor apart, as the bytes that they are."""
    laid_out: list[ShardPlan] = []
    small: dict[str, SideFile] = {}
    for name, (tree, source) in files.items():
        made = lay_out_any(f"{tag}/{name}", tree, source)
        if isinstance(made, ShardPlan):
            laid_out.append(made)
        else:
            small[f"{tag}/{name}"] = SideFile(content=made)
    return laid_out, small


def read_run(shards: Shards, ranks: int | None, stage: int | None) -> Run:
    """A run's state, and what it is to become; None: as it is.

    Raises:
        Refused: see `plan_resharding`.
    """
    _expect_known_experts(shards)
    rules = _rules(shards)
    training = read_training(shards, rules)
    ranks, stage = ranks or shards.ranks, shards.stage if stage is None else stage
    if stage != shards.stage:
        _expect_movable(shards, stage)
        training = stages.with_frozen(shards, training)
    return Run(shards, training, rules, ranks, stage)


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


def _expect_known_experts(shards: Shards) -> None:
    """Experts are cut anew where their weights have files of their own, and nothing else was split."""
    recorded = shards.model().get("ds_autoep_layers") or shards.model().get("num_experts")
    if not (shards.experts or recorded or "ds_zero_partition_groups" in kept_of(shards).inner):
        return
    if shards.universal:
        raise shards.refuse("zero-experts", "a universal checkpoint with experts can't be cut for ranks yet")
    if is_pipeline(shards.folder) or is_sliced(shards) or shards.stage == 3:
        what = "under ZeRO-3" if shards.stage == 3 else "in a model that was split by layers or within tensors too"
        text = f"experts were spread over the ranks, {what}: they can't be cut for others yet"
        advice = "resume on as many ranks as before; gather reads the weights"
        raise shards.refuse("zero-experts", text, next=advice if shards.stage == 3 else None)
    if not shards.experts:
        text = "the run had experts that were spread over the ranks, and there are no files of them"
        raise shards.refuse("zero-experts", text, next="copy them from the nodes that wrote them")


def _expect_movable(shards: Shards, stage: int) -> None:
    if shards.optimizer == BF16_OPTIMIZER and stage:
        text = "BF16_Optimizer keeps no loss scaler, which DeepSpeed's other optimizers expect in their files"
        raise shards.refuse("zero-stage", text, next="reshard with --world-size alone, which keeps the optimizer")


@dataclass(frozen=True)
class Run:
    """A run, and what it is to become."""

    shards: Shards
    training: Training
    rules: Rules
    ranks: int
    stage: int

    def model(self, rank: int) -> tuple[Any, Container]:
        """A model file's tree of the new stage. Ranks of before keep their buffers; new ones get those of rank 0."""
        shards = self.shards
        own = shards.tree(shards.files.whole or shards.files.models.get(rank, shards.files.models[0]))
        tree = own.pickle.value
        if self.stage != shards.stage:
            tree = stages.model_of_stage(shards, self.training, tree, self.stage)
        if self.stage == 0:
            return plain.with_optimizer(shards, self.training, tree, self.ranks), own
        if self.stage == 3:
            if rank and rank not in shards.files.models and tree.get("shared_params"):
                tree = changed(tree, shared_params={})  # DeepSpeed has rank 0 alone look for them
            return trees.model_of_stage_3(tree, self.training, self.rules, self.ranks, rank), own
        return trees.model_of_stages_1_and_2(tree, self.training, self.rules, self.ranks), own

    def optimizer(self, rank: int) -> tuple[Any, Container]:
        """A rank's optimizer file's tree of the new stage."""
        kept = kept_of(self.shards)
        tree, own = kept.tree, kept.source
        if self.stage != self.shards.stage:
            tree = stages.optimizer_of_stage(tree, self.stage)
        if self.stage == 3:
            return trees.optimizer_of_stage_3(tree, self.training, self.rules, self.ranks, rank), own
        is_lean = self.shards.optimizer != BF16_OPTIMIZER
        given = (tree, self.training, self.rules, self.ranks, rank)
        return trees.optimizer_of_stages_1_and_2(*given, is_lean=is_lean), own


def model_files(run: Run) -> dict[str, tuple[Any, Container]]:
    """The model files' trees by name, each with the file that it was taken from: in stage 3 one a rank."""
    shards = run.shards
    if shards.stage == 3:
        expect_one_step(shards, shards.files.models)
    whole = _PREFIX.sub("", shards.model_file())
    if run.stage != 3:
        return {whole: run.model(0)}
    return {f"zero_pp_rank_{rank}_{whole}": run.model(rank) for rank in range(run.ranks)}


def _files(run: Run) -> dict[str, tuple[Any, Container]]:
    """Trees by file name, each with the file that it was taken from."""
    if run.stage == 0:
        return model_files(run)
    first = kept_of(run.shards).file
    return model_files(run) | {_RANK.sub(str(rank), first): run.optimizer(rank) for rank in range(run.ranks)}
