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
from converter.sources.deepspeed.resharding import stages, trees
from converter.sources.deepspeed.resharding.cuts import Rules
from converter.sources.deepspeed.resharding.training import Training, read_training
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards, expect_one_step
from converter.sources.deepspeed.weights import described, training_dtype
from converter.sources.deepspeed.whole import expect_not_split
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
        ranks: None: as many as before.
        stage: None: that of the run.
        side_files: what goes beside the tag's folder; `latest` is among what is written.
        inputs: identities of those files.

    Raises:
        Refused: see `read_training`; layouts in which a rank's file holds more than its share (`zero-experts`).
    """
    run = read_run(shards, ranks, stage)
    tag = shards.folder.name
    ranks, stage = run.ranks, run.stage
    files = _files(run)
    laid_out = tuple(lay_out_tree(f"{tag}/{name}", tree, source) for name, (tree, source) in files.items())
    checks = checks_of((e.tensor for s in laid_out for e in s.entries), shards.checks)
    beside = {**side_files, LATEST: SideFile(content=tag.encode())}
    return Resharded(
        Plan(laid_out, beside, {**inputs, **shards.inputs}, {}, {}, checks=checks),
        tag,
        stage,
        shards.ranks,
        ranks,
        described(shards, shards.stage, shards.ranks),
        described(shards, stage, ranks),
        batch_words(shards.model().get("ds_config"), shards.ranks, ranks),
        tuple(shards.said),
        'engine.load_checkpoint("{out}")',
        shards.digest,
    )


def read_run(shards: Shards, ranks: int | None, stage: int | None) -> Run:
    """A run's state, and what it is to become; None: as it is.

    Raises:
        Refused: see `plan_resharding`.
    """
    _expect_plain(shards)
    rules = _rules(shards)
    training = read_training(shards, rules)
    ranks, stage = ranks or shards.ranks, stage or shards.stage
    if stage != shards.stage:
        _expect_movable(shards)
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


def _expect_plain(shards: Shards) -> None:
    """Refuse what a rank's file holds beside its share of what all ranks share."""
    model = shards.model()
    expect_not_split(shards)
    if model.get("ds_autoep_layers") or model.get("num_experts") or "ds_zero_partition_groups" in shards.optim(0):
        text = "experts were spread over the ranks, and each rank's file has its own: they can't be cut for others yet"
        raise shards.refuse("zero-experts", text)


def _expect_movable(shards: Shards) -> None:
    if shards.optimizer == BF16_OPTIMIZER:
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
        if self.stage == 3:
            return trees.model_of_stage_3(tree, self.training, self.rules, self.ranks, rank), own
        return trees.model_of_stages_1_and_2(tree, self.training, self.rules, self.ranks), own

    def optimizer(self, rank: int) -> tuple[Any, Container]:
        """A rank's optimizer file's tree of the new stage."""
        own = self.shards.tree(self.shards.files.optimizers[0])
        tree = own.pickle.value
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
    first = run.shards.files.optimizers[0]
    return model_files(run) | {_RANK.sub(str(rank), first): run.optimizer(rank) for rank in range(run.ranks)}
