"""A run's state under accelerate's FSDP in the other layout: sharded (SHARDED_STATE_DICT) or full (FULL_STATE_DICT).

Both load on any number of ranks. A run that was saved in one layout and is configured for the other finds no file of
the name that it looks for; torch's memory decides too: a full state is gathered on one rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter.core.checkpoint import RecordCheck, SideFile
from converter.core.files.opening import Identity
from converter.core.formats import torch_zip_writer as torch_zip
from converter.core.formats.pickle_values import Built, Ordered
from converter.core.formats.pickle_writer import write_pickle
from converter.core.formats.torch_tree import saved
from converter.core.tensors.nodes import LazyTensor, Stored
from converter.core.writer.accounting import checks_of
from converter.core.writer.distcp import Blob, boxed, in_files, lay_out_distcp
from converter.core.writer.plan import Plan
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.torch_trees import lay_out_tree
from converter.errors import Refused, UsageError
from converter.sources.dcp import rank_files
from converter.sources.dcp.files import kind_here, search
from converter.sources.dcp.metadata import METADATA
from converter.sources.dcp.state import MODEL, OPTIMIZER, Nest, expect_optimizer, leaves, read_full, read_sharded
from converter.sources.resharded import Resharded
from converter.sources.survey import file_names
from converter.text import fold, show

Layout = Literal["full", "sharded"]
LAYOUTS: tuple[Layout, ...] = ("full", "sharded")
_SETTING = {"full": "FULL_STATE_DICT", "sharded": "SHARDED_STATE_DICT"}
_NAMES = {
    MODEL: (re.compile(r"pytorch_model_fsdp(?:_(\d{1,4}))?\.bin", re.ASCII), "pytorch_model_fsdp"),
    OPTIMIZER: (re.compile(r"optimizer(?:_(\d{1,4}))?\.bin", re.ASCII), "optimizer"),
}
_FOLDERS = {
    MODEL: re.compile(r"pytorch_model_fsdp_(\d{1,4})", re.ASCII),
    OPTIMIZER: re.compile(r"optimizer_(\d{1,4})", re.ASCII),
}
_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class FsdpState:
    """A checkpoint's models and optimizers, in one layout.

    Attributes:
        parts: what each is, and its number, mapped to the file or folder that it lies in.
    """

    folder: Path
    layout: Layout
    parts: Mapping[tuple[str, int], Path]


def find_state(root: Path, asked: str, tag: str | None = None) -> FsdpState | None:
    """The checkpoint of accelerate's that is meant; None where it is another trainer's, or in files of ranks.

    Raises:
        UsageError: several checkpoints to choose from, or not the one asked for.
        Refused: both layouts lie in it (`fsdp-state`).
    """
    found = _state_in(root)
    if found is None:
        place = search(root, asked, tag=tag)
        if place is None:
            return None
        found = _state_in(place.folder) or _state_in(place.folder.parent)
    elif tag not in (None, root.name):
        what = f"this folder is the checkpoint {show(root.name)}, not {show(tag)}"
        raise UsageError("no-such-tag", what, where=show(asked))
    return found


def _state_in(folder: Path) -> FsdpState | None:
    names = file_names(folder)
    full = {
        (what, int(match[1] or 0)): folder / name
        for name in sorted(names)
        for what, (pattern, _) in _NAMES.items()
        if (match := pattern.fullmatch(name)) is not None
    }
    sharded = {
        (what, int(match[1])): path
        for path in sorted(folder.iterdir() if folder.is_dir() else ())
        for what, pattern in _FOLDERS.items()
        if (match := pattern.fullmatch(path.name)) is not None and kind_here(path) is not None
    }
    if any(what == MODEL for what, _ in sharded):
        if any(what == MODEL for what, _ in full):
            what = "models lie here in both layouts, and nothing says which is of this step"
            raise Refused("fsdp-state", what, where=show(folder), next="move those of the older save elsewhere")
        return FsdpState(folder, "sharded", sharded)
    return FsdpState(folder, "full", full) if any(what == MODEL for what, _ in full) else None


def plan_fsdp(
    state: FsdpState, to: Layout, *, side_files: Mapping[str, SideFile], inputs: Mapping[str, Identity]
) -> Resharded:
    """The plan for the same state in another layout.

    Raises:
        UsageError: it has that layout (`usage`).
        Refused: files missing, cut short or malformed, or a state that isn't as accelerate saves it (`fsdp-state`).
    """
    if state.layout == to:
        what = f"the state is {to} already ({_SETTING[to]})"
        raise UsageError("usage", what, where=show(state.folder), expected=next(k for k in LAYOUTS if k != to))
    shards: list[ShardPlan] = []
    files = dict(side_files)
    read, checks = dict(inputs), list[RecordCheck]()
    digests: dict[str, str] = {}
    for (what, number), path in state.parts.items():
        nest = read_sharded(path, what) if state.layout == "sharded" else read_full(path)
        _expect(what, nest, path)
        if to == "full":
            shards.append(_one_file(what, number, nest))
        else:
            made, metadata, folder = _many_files(what, number, nest)
            shards += made
            files[f"{folder}/{METADATA}"] = SideFile(content=metadata)
        read |= nest.inputs
        checks += nest.checks
        digests[path.name] = nest.digest
    plan = Plan(tuple(shards), files, read, {}, {})
    plan = dataclasses.replace(plan, checks=checks_of((e.tensor for e in plan.entries), checks))
    return Resharded(
        plan,
        state.folder.name,
        None,
        0,
        0,
        f"accelerate FSDP, {state.layout}",
        f"accelerate FSDP, {to}, for any number of ranks",
        None,
        tuple(_said(state)),
        f"fsdp_state_dict_type: {_SETTING[to]}, and accelerator.load_state({{out}})",
        hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest(),
    )


def plan_ranks(
    folder: Path, ranks: int, *, side_files: Mapping[str, SideFile], inputs: Mapping[str, Identity]
) -> Resharded:
    """The plan for files of ranks (accelerate's `use_dcp=False`) for another number of them.

    Raises:
        Refused: see `rank_files.resharded`.
    """
    made = rank_files.resharded(folder, ranks)
    plan = Plan(made.shards, dict(side_files), {**inputs, **made.inputs}, {}, {})
    plan = dataclasses.replace(plan, checks=checks_of((e.tensor for e in plan.entries), made.checks))
    before, after = (f"{n} {'rank' if n == 1 else 'ranks'}" for n in (made.world, ranks))
    is_accelerate = any(s.file.startswith("pytorch_model_fsdp") for s in made.shards)
    words = f"{'accelerate ' if is_accelerate else ''}FSDP, one file a rank"
    goes_on = "each loads its own file of {out}"
    if is_accelerate:
        goes_on = "use_dcp=False, as it was saved, and accelerator.load_state({out})"
    return Resharded(
        plan, folder.name, None, made.world, ranks, f"{words}, {before}", f"{words}, {after}", None, made.said, goes_on,
        made.digest,
    )  # fmt: skip


def _said(state: FsdpState) -> list[str]:
    numbers = {n for what, n in state.parts if what == MODEL}
    alone = sorted(numbers - {n for what, n in state.parts if what == OPTIMIZER})
    if not alone:
        return []
    return [f"no optimizer lies beside {fold([state.parts[MODEL, n].name for n in alone])}: its state begins anew"]


def _expect(what: str, nest: Nest, path: Path) -> None:
    if what == OPTIMIZER:
        expect_optimizer(nest, path)
    elif not nest.value or not all(isinstance(n, str) for n in nest.value):
        raise Refused("fsdp-state", "there are no weights by name", where=show(path))


def _one_file(what: str, number: int, nest: Nest) -> ShardPlan:
    """The file of FULL_STATE_DICT, named as accelerate names it."""
    stem = _NAMES[what][1]
    tree = _Tree(shares=what == MODEL)
    value = Ordered((n, tree.made(t)) for n, t in nest.value.items()) if what == MODEL else tree.made(nest.value)
    return lay_out_tree(f"{stem}_{number}.bin" if number else f"{stem}.bin", value)


@dataclass
class _Tree:
    """What is read as what is written; weights that are one stored tensor stay one."""

    shares: bool
    _made: dict[Stored, Built] = dataclasses.field(default_factory=dict)

    def made(self, value: Any) -> Any:
        if isinstance(value, Stored) and self.shares and value.info.numel:
            return self._made.setdefault(value, saved(value))
        if isinstance(value, LazyTensor):
            return saved(value)
        if isinstance(value, dict):
            return {k: self.made(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.made(v) for v in value)
        return value


def _many_files(what: str, number: int, nest: Nest) -> tuple[tuple[ShardPlan, ...], bytes, str]:
    """The distributed checkpoint of SHARDED_STATE_DICT, its metadata, and the folder that it goes to."""
    folder = f"{_NAMES[what][1]}_{number}"
    flat = list(leaves(nest.value, what))
    paths = {key: path for key, path, _ in flat}
    if len(paths) != len(flat):
        raise Refused("fsdp-state", "two entries have one key in a distributed checkpoint", where=folder)
    tensors = in_files({k: boxed(v) for k, _, v in flat if isinstance(v, LazyTensor)}, _FILE_BYTES)
    if not tensors:
        raise Refused("fsdp-state", "there is no tensor in it", where=folder)
    first = next(iter(tensors.values())).boxes[0].file
    blobs = {k: Blob(_object(v), first) for k, _, v in flat if not isinstance(v, LazyTensor)}
    made, metadata = lay_out_distcp(tensors, blobs, paths=paths, folder=folder)
    return made, metadata, folder


def _object(value: Any) -> bytes:
    return torch_zip.tensorless(write_pickle(value, reference=lambda identity: identity))
