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

from converter.core.files.opening import read_limited
from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.sources.megatron_files import kind_here as megatron_here
from converter.sources.places import Place, by_number, several_checkpoints, several_parts
from converter.sources.survey import file_names, folder_kind
from converter.text import fold, show

Kind = Literal["dcp", "full", "ranks", "hf-shards", "rank-metadata", "no-metadata"]

METADATA = ".metadata"
FULL = re.compile(r"pytorch_model_fsdp(?:_\d+)?\.bin", re.ASCII)
MODEL_OF_RANK = re.compile(
    r"(pytorch_model_fsdp(?:_\d{1,6})?|(?:fsdp_)?(?:model|weights)(?:_state(?:_dict)?)?)[_.-]?rank[_.-]?(\d{1,6})"
    r"\.(?:bin|pt|pth)",
    re.ASCII,
)
"""A rank's own file of the model: accelerate's, and as people call what they save by themselves."""
OPTIMIZER_OF_RANK = re.compile(
    r"(optimizer(?:_\d{1,6})?|(?:fsdp_)?optim(?:izer)?(?:_state(?:_dict)?)?)[_.-]?rank[_.-]?(\d{1,6})\.(?:bin|pt|pth)",
    re.ASCII,
)
_PART = re.compile(r"pytorch_model_fsdp_\d+", re.ASCII)
_ASIDE = re.compile(r"(?:optim|optimizer|lr_scheduler|scheduler|dataloader|rng|tokenizer)(?:_\w+)?", re.ASCII)
_STEP = re.compile(r"(?:checkpoint|global_step|step|iter|epoch)[-_=]?\d", re.ASCII)
PIECE = re.compile(r"shard-(?P<rank>\d{5,})-model-(?P<file>\d{5,})-of-(?P<files>\d{5,})\.safetensors", re.ASCII)
"""A file of HuggingFaceStorageWriter: one rank's pieces."""
_RANK_METADATA = re.compile(r"__\d+\.metadata", re.ASCII)
DEPTH = 4
"""Folders below a run's in which a model is looked for: NeMo-RL has it in `step_N/policy/weights/model`."""
TRACKERS = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt", "latest")
"""Files in which a run names its last complete checkpoint: Megatron's and slime's, others'."""


def kind_here(root: Path) -> Kind | None:
    """What of this source lies in a folder itself."""
    names = file_names(root)
    pieces = [n for n in names if n.endswith(".distcp")]
    if pieces or METADATA in names:
        if megatron_here(root) is not None:
            return None
        if METADATA in names:
            return "dcp"
        if any(_RANK_METADATA.fullmatch(n) for n in names):
            return "rank-metadata"
        return "no-metadata"
    ours = [n for n in names if FULL.fullmatch(n) or MODEL_OF_RANK.fullmatch(n)]
    if folder_kind(names - set(ours)) is not None:
        return None
    if any(PIECE.fullmatch(n) for n in names):
        return "hf-shards"
    if any(FULL.fullmatch(n) for n in ours):
        return "full"
    return "ranks" if ours else None


def folders_in(root: Path) -> list[Path]:
    """Folders right below `root` that hold a model of this source, by the numbers in their names."""
    if folder_kind(file_names(root)) is not None:
        return []
    return [p for p in _folders(root) if kind_here(p) is not None]


def _holds_models(folder: Path, depth: int = DEPTH) -> bool:
    """True where a model of this source lies in a folder or somewhere below it."""
    if kind_here(folder) is not None:
        return True
    if depth == 0 or folder_kind(file_names(folder)) is not None:
        return False
    return any(_holds_models(p, depth - 1) for p in _folders(folder))


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
    runs = found or [p for p in _folders(root) if _holds_models(p, DEPTH - 1)]
    if not runs:
        return None
    if not any(_STEP.match(p.name) for p in runs):
        return _inside(runs, asked, tag, part)
    one, why = _step(root, runs, asked, tag)
    if one in found:
        return Place(one, why)
    inner = search(one, f"{asked.rstrip('/')}/{one.name}", part=part)
    assert inner is not None
    return Place(inner.folder, f"in {show(one.name)}, {why}; {inner.why}")


def _step(root: Path, runs: list[Path], asked: str, tag: str | None) -> tuple[Path, str]:
    """One checkpoint of a run, and why it is that one."""
    if tag is not None:
        named = [p for p in runs if p.name == tag]
        if not named:
            listed = ", ".join(show(p.name) for p in runs[-8:])
            raise UsageError("no-such-tag", f"there is no checkpoint {show(tag)}", where=show(asked), expected=listed)
        return named[0], "asked for with --tag"
    if len(runs) == 1:
        return runs[0], "the only checkpoint of the run"
    for tracker in TRACKERS:
        number = _tracked(root / tracker, root)
        latest = [p for p in runs if number is not None and _last_number(p) == number]
        if len(latest) == 1:
            return latest[0], f"`{tracker}` says so"
    raise several_checkpoints(asked, runs)


def _tracked(path: Path, root: Path) -> int | None:
    """The step that a run's tracker file names."""
    if not path.is_file():
        return None
    try:
        text = read_limited(path, limit=64, root=root).decode("ascii").strip()
    except (Refused, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def _last_number(folder: Path) -> int | None:
    numbers = by_number(folder)[0]
    return numbers[-1] if numbers else None


def _inside(below: list[Path], asked: str, tag: str | None, part: str | None) -> Place | None:
    """The model in folders that are not steps: a trainer's folder for it (`policy/weights/model`), or its parts."""
    chosen = [p for p in below if part in (None, p.name)] or below
    if len(chosen) > 1:
        if part is not None:
            listed = ", ".join(show(p.name) for p in chosen[:8])
            raise UsageError("no-such-part", f"there is no model {show(part)}", where=show(asked), expected=listed)
        raise several_parts(asked, chosen)
    (one,) = chosen
    inner = search(one, f"{asked.rstrip('/')}/{one.name}", tag=tag if kind_here(one) is None else None)
    assert inner is not None
    return Place(inner.folder, f"the only model in {show(one.name)}" if inner.folder == one else inner.why)


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
    """Folders in which a model may lie; an optimizer's own is none, though it has the same files."""
    try:
        return sorted((p for p in root.iterdir() if p.is_dir() and not _ASIDE.fullmatch(p.name)), key=by_number)
    except OSError:
        return []


def optimizer_folder(folder: Path) -> Path | None:
    """Where accelerate put the optimizer of a model: `optimizer_0` beside `pytorch_model_fsdp_0`."""
    if not _PART.fullmatch(folder.name):
        return None
    beside = folder.parent / f"optimizer_{folder.name.rpartition('_')[2]}"
    return beside if kind_here(beside) in ("dcp", "rank-metadata", "no-metadata") else None


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
