"""A run's state as DeepSpeed's universal checkpoint: whole parameters, a folder each, which it cuts as it loads them.

The order of parameters is that of the files, round robin undone, which ds_to_universal.py doesn't do. DeepSpeed's own
loader has the order wrong there too, whatever lies in the files, so that such runs are refused.

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/checkpoint/ds_to_universal.py (`main`,
`_save_optimizer_state`), deepspeed/checkpoint/universal_checkpoint.py (`load_hp_checkpoint_state`) and stage3.py
(`load_hp_checkpoint_state_from_checkpoint_dir_stage3`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from converter.core.checkpoint import SideFile
from converter.core.files.opening import Identity
from converter.core.formats.torch_tree import changed, saved
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.core.writer.accounting import checks_of
from converter.core.writer.plan import Plan
from converter.sources.deepspeed.resharding.kept import kept_of
from converter.sources.deepspeed.resharding.plan import laid_out_files, model_files, read_run
from converter.sources.deepspeed.resharding.training import Group, base_tree
from converter.sources.deepspeed.state import BF16_OPTIMIZER, Shards
from converter.sources.deepspeed.weights import described
from converter.sources.deepspeed.whole import expect_not_split
from converter.sources.deepspeed.zero_folder import MASTER
from converter.sources.resharded import Resharded
from converter.text import show

LATEST_UNIVERSAL = "latest_universal"
SUFFIX = "_universal"
_FOLDER = re.compile(r"[\w-][\w.-]{0,250}", re.ASCII)
_OF_RANKS = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups", "fp32_flat_groups")
_FILES = {MASTER: "fp32"}


def plan_universal(
    shards: Shards, ranks: int | None, *, side_files: Mapping[str, SideFile], inputs: Mapping[str, Identity]
) -> Resharded:
    """Every file of a universal checkpoint; in stage 3 with a model file for each of `ranks`.

    Raises:
        Refused: see `read_run`; a run that DeepSpeed's loader would get wrong (`zero-universal`).
    """
    expect_not_split(shards, "a universal checkpoint")
    run = read_run(shards, ranks, None)
    _expect_loadable(shards, run.rules.round_robin, run.training.names)
    tag = shards.folder.name + SUFFIX
    files = dict(model_files(run))
    source = kept_of(shards).source
    for group in run.training.groups:
        for name in group.shapes:
            own = _of_parameter(group, name, is_flat=shards.stage == 3)
            files |= {f"zero/{name}/{key}.pt": (tree, source) for key, tree in own}
    files["zero/optimizer_state.pt"] = (_common(shards, run.training.groups[0]), source)
    laid_out, small = laid_out_files(tag, files)
    beside = {**side_files, **small, LATEST_UNIVERSAL: SideFile(content=tag.encode())}
    checks = checks_of((e.tensor for s in laid_out for e in s.entries), shards.checks)
    said = list(shards.said)
    known = {*run.training.names, *(shards.model().get("shared_params") or {})}
    if others := [n for n in shards.model()["module"] if n not in known]:
        kept = f"{len(others)} frozen tensors and buffers stay as the model is built"
        said.append(f"DeepSpeed loads from it what was trained; {kept}")
    if shards.stage == 3 and len({repr(_settings(g)) for g in run.training.groups}) > 1:
        all_one = "under ZeRO-3 DeepSpeed's loader gives all parameter groups the settings of the first"
        said.append(f"{all_one}; --world-size keeps each group's own")
    return Resharded(
        Plan(tuple(laid_out), beside, {**inputs, **shards.inputs}, {}, {}, checks=checks),
        tag,
        shards.stage,
        shards.ranks,
        run.ranks,
        described(shards, shards.stage, shards.ranks),
        f"universal, of ZeRO-{shards.stage}",
        None,
        tuple(said),
        'engine.load_checkpoint("{out}") with "checkpoint": {"load_universal": true} in DeepSpeed\'s settings',
        shards.digest,
    )


def _expect_loadable(shards: Shards, round_robin: bool, names: list[str]) -> None:
    wrong = [n for n in names if not _FOLDER.fullmatch(n)]
    if shards.optimizer == BF16_OPTIMIZER:
        what = "BF16_Optimizer keeps no loss scaler, which the loader of a universal checkpoint expects"
    elif round_robin and shards.stage < 3:
        what = "round_robin_gradients is on, and DeepSpeed loads a universal checkpoint of such a run in another order"
    elif wrong:
        what = f"the parameter {show(wrong[0])} can't be the name of a folder"
    else:
        return
    raise shards.refuse("zero-universal", what, next="reshard with --world-size, which keeps the layout")


def _of_parameter(group: Group, name: str, *, is_flat: bool) -> Iterator[tuple[str, Any]]:
    """A parameter's files without their suffix, and what they hold: under ZeRO-3 flat tensors, and no steps."""
    shape = tuple(group.shapes[name])
    for key, flats in group.states.items():
        flat = saved(flats[name], requires_grad=key == MASTER)
        yield _FILES.get(key, key), flat if is_flat else {"param": saved(tensors.reshape(flats[name], shape))}
    numbers: Mapping[str, Any] = {} if is_flat else group.numbers
    for key, number in numbers.items():
        yield key, saved(number) if isinstance(number, LazyTensor) else number


def _common(shards: Shards, first: Group) -> Any:
    """The optimizer's state that belongs to no rank: settings, loss scaler, steps."""
    inner = kept_of(shards).inner
    base = base_tree(shards, inner)
    kept = {k: v for k, v in inner.items() if k not in _OF_RANKS}
    kept["param_groups"] = base["param_groups"]
    if shards.stage == 3:
        numbers = {k: saved(v) if isinstance(v, LazyTensor) else v for k, v in first.numbers.items()}
        kept["optimizer_state_dict"] = changed(base, state={0: numbers} if first.keys else {})
    return kept


def _settings(group: Group) -> Mapping[Any, Any]:
    return {k: v for k, v in group.settings.items() if k != "params"}
