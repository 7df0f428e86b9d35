"""Files of ranks, accelerate's (`use_dcp=False`) or people's own: each has its pieces of every tensor, by `torch.save`.

Under FSDP2 a piece is a DTensor, which records the whole's shape, the mesh of ranks and the rank's place on it: the
pieces are put together as those of verl, which saves the same. Plain tensors are put together where their rows are,
together, what the class of config.json asks for. FSDP1's local state (ShardedTensor, flat parameters) is refused.

Source of the names: `save_fsdp_model` and `save_fsdp_optimizer`,
https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused, UsageError
from converter.sources.dcp.files import MODEL_OF_RANK, OPTIMIZER_OF_RANK
from converter.sources.survey import file_names
from converter.sources.verl.agreement import expect_same_groups
from converter.sources.verl.files import RankFiles
from converter.sources.verl.moments import State as Moment
from converter.sources.verl.moments import moments as numbered_moments
from converter.sources.verl.resharding import Part, Resharding
from converter.sources.verl.shards import Piece, Ranks, Value
from converter.sources.verl.weights import Weights, read_weights
from converter.text import fold, show

_LOCAL = "pytorch_model_fsdp"
_NUMBER = re.compile(r"(rank[_.-]?)\d{1,6}", re.ASCII)
_CODE = "fsdp-rank-files"


def gathered(folder: Path) -> tuple[Weights, Ranks]:
    """The model that the ranks' files make up.

    Raises:
        UsageError: files of several models (`several-parts`).
        Refused: files missing, cut short, or of a kind that is not put together (`fsdp-rank-files`).
    """
    ranks = Ranks(_files(folder))
    try:
        found = read_weights(ranks, asked_alone=True)
    except Refused as error:
        if error.code.startswith("verl-"):  # the same layout, another trainer's files
            raise _refused(folder, error.what) from error
        raise
    return found, ranks


def resharded(folder: Path, ranks: int) -> Part:
    """Every rank's files for another number of ranks, as accelerate names them.

    Raises:
        Refused: files missing or mixed, a mesh of several dimensions, or one that can't be rewritten
            (`fsdp-rank-files`).
    """
    found, read = gathered(folder)
    every = {"model": read.files.models, "optim": read.files.optimizers}
    names = {kind: _NUMBER.sub(r"\1{rank}", next(iter(files.values()))) for kind, files in every.items() if files}
    made = Resharding(read, found, ranks, "", tied=False, names=names)
    try:
        if missing := read.files.missing(read.files.models):
            raise read.refuse("verl-rank-missing", f"files of ranks {fold(list(map(str, missing)))} are missing")
        shards = made.models()
        if read.files.optimizers:
            shards += made.optimizers()
        else:
            read.said.append("no optimizer was saved with it: its state begins anew")
    except Refused as error:
        if error.code.startswith("verl-"):
            raise Refused(_CODE, error.what, where=error.where, next=error.next) from error
        raise
    said = (*read.files.said, *read.said)
    return Part(read.files.world, tuple(shards), {}, read.inputs, tuple(read.checks), read.digest, said)


def trained(folder: Path) -> frozenset[str]:
    """Names of which an optimizer's file of a rank has a state; none where there are no such files."""
    ranks = Ranks(_files(folder))
    first = next(iter(ranks.files.optimizers.values()), None)
    return frozenset() if first is None else frozenset(_states(ranks, first))


def moments(folder: Path, which: Moment) -> dict[str, LazyTensor]:
    """A moment of each parameter by its name, put together of the ranks' pieces.

    Raises:
        Refused: files missing, of several saves, or of a kind that is not put together (`fsdp-rank-files`).
    """
    try:
        return _moments(folder, which)
    except Refused as error:
        if error.code.startswith("verl-"):
            raise _refused(folder, error.what, "the optimizer's state") from error
        raise


def _moments(folder: Path, which: Moment) -> dict[str, LazyTensor]:
    ranks = Ranks(_files(folder))
    first = next(iter(ranks.files.optimizers.values()), None)
    if first is not None and not _states(ranks, first) and ranks.open(first).get("state"):
        return numbered_moments(ranks, read_weights(ranks, asked_alone=True), which)  # by `optimizer.state_dict()`
    held: dict[str, dict[int, Value]] = {}
    steps: dict[str, dict[int, Value]] = {}
    for rank, file in ranks.files.optimizers.items():
        for name, state in _states(ranks, file).items():
            for key, into in ((which, held), ("step", steps)):
                value = ranks.value(state.get(key), file, name)
                if value is not None:
                    into.setdefault(name, {})[rank] = value
    for name, by_rank in steps.items():
        ranks.whole(f"the step of {name}", by_rank, ranks.files.optimizers)  # of two steps: refused
    expect_same_groups(ranks, ranks.files.optimizers)
    found: dict[str, LazyTensor] = {}
    for name, by_rank in held.items():
        if all(isinstance(v, Piece) for v in by_rank.values()):
            whole = ranks.whole(name, by_rank, ranks.files.optimizers)
            if whole is None:
                what = f"the ranks' pieces of the moment of {show(name)} are not all there"
                raise _refused(folder, what, "the optimizer's state")
            found[name] = whole
    return found


def _states(ranks: Ranks, file: str) -> Mapping[str, Mapping[str, Any]]:
    states = ranks.open(file).get("state")
    if not isinstance(states, dict):
        return {}
    return {n: s for n, s in states.items() if isinstance(n, str) and isinstance(s, dict)}


def _files(folder: Path) -> RankFiles:
    """The files of one model, and of its optimizer, by rank."""
    names = file_names(folder)
    models = _by_rank(names, MODEL_OF_RANK)
    if len(models) > 1:
        text = f"{len(models)} models were trained together: {fold([show(n) for n in sorted(models)])}"
        raise UsageError("several-parts", text, where=show(folder), next="put the files of each into its own folder")
    ((stem, files),) = models.items()
    optimizers = _by_rank(names, OPTIMIZER_OF_RANK)
    number = stem.removeprefix(_LOCAL) if stem.startswith(_LOCAL) else None
    own = optimizers.get(f"optimizer{number}", {}) if number is not None else next(iter(optimizers.values()), {})
    world = _recorded_world(folder, files) or max(files) + 1
    kept = [{r: n for r, n in f.items() if r < world} for f in (files, own)]
    found = RankFiles(folder, world, kept[0], kept[1])
    if stale := [n for f in (files, own) for r, n in f.items() if r >= world]:
        found.said.append(f"left over from a run with more than {world} ranks, not read: {fold(stale)}")
    return found


def _by_rank(names: Collection[str], pattern: re.Pattern[str]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for name in sorted(names):
        if (match := pattern.fullmatch(name)) is not None:
            found.setdefault(match[1], {})[int(match[2])] = name
    return found


def _recorded_world(folder: Path, files: Mapping[int, str]) -> int | None:
    """How many ranks there were, by the mesh that the first file's pieces record: no name of a file says it.

    Raises:
        Refused: the file is of FSDP1's local state, or no file of torch.save.
    """
    first = files[min(files)]
    ranks = Ranks(RankFiles(folder, len(files), dict(files), {}))
    try:
        state = ranks.open(first)
        for name, saved in state.items():
            value = ranks.value(saved, first, show(str(name)))
            if isinstance(value, Piece):
                return None if value.mesh is None else math.prod(value.mesh)
    except Refused as error:
        if error.code == "pickle-names" and "remote_device" in error.what:
            what = "they hold pieces of FSDP 1 (ShardedTensor), which are not read"
            raise _refused(folder, what) from error
        raise _refused(folder, f"{show(first)}: {error.what}") from error
    return None


def _refused(folder: Path, why: str, whole: str = "the model") -> Refused:
    return Refused(
        _CODE,
        "each rank saved its own file (LOCAL_STATE_DICT, use_dcp=False, or torch.save on every rank), and they are "
        f"not {whole} together: {why}",
        where=show(folder),
        next="copy files of ranks that are on other nodes; else resume the run from it, and save with "
        "fsdp_state_dict_type: FULL_STATE_DICT or SHARDED_STATE_DICT",
    )
