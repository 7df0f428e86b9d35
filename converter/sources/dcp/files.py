"""Folders of torch's distributed checkpoints and of accelerate's FSDP checkpoints, told by their file names.

Source of the names: https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py
(`save_fsdp_model`), https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/filesystem.py and
_hf_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.sources.places import Place, by_number
from converter.sources.survey import file_names, folder_kind
from converter.sources.unread import is_megatron_sharded
from converter.text import fold, show

Kind = Literal["dcp", "full", "ranks", "hf-shards", "rank-metadata", "no-metadata"]

METADATA = ".metadata"
FULL = re.compile(r"pytorch_model_fsdp(?:_\d+)?\.bin", re.ASCII)
_RANKS = re.compile(r"pytorch_model_fsdp(?:_\d+)?_rank\d+\.bin", re.ASCII)
_PART = re.compile(r"pytorch_model_fsdp_\d+", re.ASCII)
_OPTIMIZER = re.compile(r"optimizer_\d+", re.ASCII)
_HF_SHARD = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors", re.ASCII)
_RANK_METADATA = re.compile(r"__\d+\.metadata", re.ASCII)


def kind_here(root: Path) -> Kind | None:
    """What of this source lies in a folder itself."""
    names = file_names(root)
    pieces = [n for n in names if n.endswith(".distcp")]
    if pieces or METADATA in names:
        if is_megatron_sharded(root, names):
            return None
        if METADATA in names:
            return "dcp"
        if any(_RANK_METADATA.fullmatch(n) for n in names):
            return "rank-metadata"
        return "no-metadata"
    ours = [n for n in names if FULL.fullmatch(n) or _RANKS.fullmatch(n)]
    if folder_kind(names - set(ours)) is not None:
        return None
    if any(_HF_SHARD.fullmatch(n) for n in names):
        return "hf-shards"
    if any(FULL.fullmatch(n) for n in ours):
        return "full"
    return "ranks" if ours else None


def folders_in(root: Path) -> list[Path]:
    """Folders right below `root` that hold a model of this source, by the numbers in their names."""
    if folder_kind(file_names(root)) is not None:
        return []
    try:
        folders = [p for p in root.iterdir() if p.is_dir() and not _OPTIMIZER.fullmatch(p.name)]
    except OSError:
        return []
    return sorted((p for p in folders if kind_here(p) is not None), key=by_number)


def search(root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
    """The folder that a user means by it, by the checkpoint's folder or by the run's; None where nothing is here.

    Raises:
        UsageError: several to choose from (`several-checkpoints`, `several-parts`), or not the one asked for
            (`no-such-tag`, `no-such-part`).
    """
    if kind_here(root) is not None:
        return _named(root, asked, tag, part)
    found = folders_in(root)
    if found and all(_PART.fullmatch(p.name) for p in found):
        return _part(found, asked, part)
    runs = found or [p for p in _folders(root) if folders_in(p)]
    if not runs:
        return None
    if tag is not None:
        runs = [p for p in runs if p.name == tag]
        if not runs:
            listed = ", ".join(show(p.name) for p in (found or _folders(root))[-8:])
            raise UsageError("no-such-tag", f"there is no checkpoint {show(tag)}", where=show(asked), expected=listed)
    if len(runs) > 1:
        named = [f"{asked.rstrip('/')}/{p.name}" for p in runs[-8:]]
        raise UsageError(
            "several-checkpoints",
            f"a run folder with {len(runs)} checkpoints; name one of them",
            where=show(asked),
            expected=", ".join(map(show, named)),
            next=_tagged(asked, runs[-1].name),
        )
    (one,) = runs
    why = "asked for with --tag" if tag is not None else "the only checkpoint of the run"
    if found:
        return Place(one, why)
    inner = search(one, f"{asked.rstrip('/')}/{one.name}", part=part)
    assert inner is not None
    return Place(inner.folder, f"in {show(one.name)}, {why}; {inner.why}")


def _named(root: Path, asked: str, tag: str | None, part: str | None) -> Place:
    if tag not in (None, root.name):
        raise UsageError(
            "no-such-tag", f"this folder is the checkpoint {show(root.name)}, not {show(tag)}", where=asked
        )
    if part not in (None, root.name):
        raise UsageError("no-such-part", f"this folder is {show(root.name)}, not {show(part)}", where=asked)
    return Place(root, "named by you")


def _part(found: list[Path], asked: str, part: str | None) -> Place:
    """One of the models that were prepared together: accelerate numbers them."""
    chosen = [p for p in found if part in (None, p.name)]
    listed = ", ".join(show(p.name) for p in found[:8])
    if not chosen:
        raise UsageError("no-such-part", f"there is no model {show(part)}", where=show(asked), expected=listed)
    if len(chosen) > 1:
        raise UsageError(
            "several-parts",
            f"{len(chosen)} models were trained together; name one of them",
            where=show(asked),
            expected=listed,
            offers=[p.name for p in chosen],
            next=Again(("--part", chosen[0].name), otherwise=Command("gather", (str(chosen[0]), "OUT"))),
        )
    return Place(chosen[0], "asked for with --part" if part else "its only model")


def _folders(root: Path) -> list[Path]:
    try:
        return sorted((p for p in root.iterdir() if p.is_dir()), key=by_number)
    except OSError:
        return []


def optimizer_folder(folder: Path) -> Path | None:
    """Where accelerate put the optimizer of a model: `optimizer_0` beside `pytorch_model_fsdp_0`."""
    if not _PART.fullmatch(folder.name):
        return None
    beside = folder.parent / f"optimizer_{folder.name.rpartition('_')[2]}"
    return beside if kind_here(beside) == "dcp" else None


def full_file(folder: Path, names: Collection[str]) -> Path:
    """The one file of weights that FULL_STATE_DICT wrote.

    Raises:
        UsageError: several models have theirs here (`several-parts`).
    """
    found = sorted(n for n in names if FULL.fullmatch(n))
    if len(found) > 1:
        text = f"{len(found)} models were trained together: {fold([show(n) for n in found])}"
        raise UsageError("several-parts", text, where=show(folder), next="put each into a folder of its own")
    return folder / found[0]


def refusal(folder: Path, kind: Kind) -> Refused:
    """Why a recognised layout is not read, and what can be done."""
    code, text, advice = _NOT_READ[kind]
    return Refused(code, text, where=show(folder), next=advice)


_NOT_READ: dict[Kind, tuple[str, str, str]] = {
    "ranks": (
        "fsdp-rank-files",
        "each rank saved its own file (LOCAL_STATE_DICT, or accelerate's use_dcp=False); they are not put together",
        "resume the run from it, and save with fsdp_state_dict_type: FULL_STATE_DICT or SHARDED_STATE_DICT",
    ),
    "hf-shards": (
        "dcp-hf-shards",
        "pieces by HuggingFaceStorageWriter: no file says how many there are, so a lost one would not be noticed",
        "save with enable_consolidation=True, or consolidate_safetensors_files_on_every_rank of torch, with all files",
    ),
    "rank-metadata": (
        "dcp-rank-metadata",
        "every rank wrote metadata of its own (saved with use_collectives=False): none of them knows all tensors",
        "load it with torch on as many ranks, and save with use_collectives=True",
    ),
    "no-metadata": (
        "dcp-metadata-missing",
        ".metadata is missing: rank 0 writes it last, and only it says what the .distcp files hold",
        "copy the hidden file .metadata from the node of rank 0 if it is there, or take an earlier checkpoint",
    ),
}


def _tagged(asked: str, tag: str) -> Again:
    """The user's command with a tag."""
    return Again(("--tag", tag), otherwise=Command("gather", (asked, "OUT", "--tag", tag)))
