"""DeepSpeed's checkpoint folders by their file names: which tag, which ranks, and what other layouts look like.

Source of the names: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/engine.py
(`_get_ckpt_name`, `_get_optimizer_ckpt_name`, `_get_expert_ckpt_name`), and for layers of a pipeline
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/pipe/module.py (`ckpt_layer_path`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from converter.core.files.opening import read_limited
from converter.errors import Refused, UsageError
from converter.sources.places import LIGHTNING_DEPTH, Place, by_number, lightning_folders, tagged
from converter.sources.survey import file_names
from converter.sources.unread import other_layout
from converter.text import fold, show

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
UNIVERSAL = "zero"
"""The folder with one folder a parameter, in a universal checkpoint."""
MAX_TAG = 200
# The files of old versions lack the underscore before their last word.
_MODEL = re.compile(r"(?:(?:bf16_)?zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,4})_?model_states\.pt", re.ASCII)
EXPERT_FILE = re.compile(r"(?:layer_(\d{1,6})_)?expert_(\d{1,6})_mp_rank_(\d{1,4})_model_states\.pt", re.ASCII)
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,4})_?optim_states\.pt", re.ASCII)
LAYER = re.compile(r"layer_(\d{1,6})(?:-model_(\d{1,4}))?-model_states\.pt", re.ASCII)
"""A layer of a pipeline, and which tensor-parallel rank's."""
_TRAINER_FOLDER = re.compile(r"(?:checkpoint|step|epoch|iter)[-_]?\d+", re.ASCII)


@dataclass(frozen=True)
class RankFiles:
    """Shard files of a tag's folder.

    Attributes:
        whole: the model file that holds for all ranks (stages 0 to 2), if there is one.
        models: model files by rank (stage 3).
        optimizers: optimizer files by rank.
    """

    folder: Path
    whole: str | None
    models: dict[int, str]
    optimizers: dict[int, str]


def holds_shards(names: Collection[str]) -> bool:
    """True where DeepSpeed's model or optimizer files are among these names."""
    return any(_MODEL.fullmatch(n) or _OPTIMIZER.fullmatch(n) for n in names)


def is_universal(folder: Path) -> bool:
    """True for what ds_to_universal.py writes: `zero/<parameter>/fp32.pt`, and no rank's optimizer file."""
    zero = folder / UNIVERSAL
    if not zero.is_dir() or any(_OPTIMIZER.fullmatch(n) for n in file_names(folder)):
        return False
    return (zero / "optimizer_state.pt").is_file() or any((p / "fp32.pt").is_file() for p in _folders(zero)[:16])


def holds_ranks(folder: Path) -> bool:
    """True where ranks saved their shards into this folder; a universal checkpoint has model files too."""
    return holds_shards(file_names(folder)) and not is_universal(folder)


def tags_in(root: Path) -> list[Path]:
    """Folders below `root` that hold ranks' shards, by the numbers in their names."""
    return [p for p in _folders(root) if holds_ranks(p)]


def universal_in(root: Path) -> list[Path]:
    """Folders below `root` that hold universal checkpoints, by the numbers in their names."""
    return [p for p in _folders(root) if is_universal(p)]


def _folders(root: Path) -> list[Path]:
    try:
        return sorted((p for p in root.iterdir() if p.is_dir()), key=by_number)
    except OSError:
        return []


def find_tag(root: Path, asked: str, tag: str | None = None) -> Place:
    """The tag's folder that a user means by it, by its parent (`latest` is obeyed) or by the run's folder.

    Raises:
        UsageError: no shards (`no-shards`), and see `search_tag`.
        Refused: see `search_tag`.
    """
    found = search_tag(root, asked, tag)
    if found is None:
        raise UsageError(
            "no-shards",
            "there are no DeepSpeed shards here",
            where=show(asked),
            expected="a folder such as global_step500, its parent, or the run's folder",
        )
    return found


def search_tag(root: Path, asked: str, tag: str | None = None) -> Place | None:
    """The same, or None where nothing here is DeepSpeed's.

    Raises:
        UsageError: several to choose from (`several-checkpoints`), or no such tag.
        Refused: `latest` names a tag that isn't there (`zero-latest`), or a layout that is not read.
    """
    if is_universal(root):
        return None
    if holds_ranks(root):
        return _itself(root, asked, tag)
    if (refusal := other_layout(root)) is not None:
        raise refusal
    tags, universal = tags_in(root), universal_in(root)
    if universal and (not tags or tag in {p.name for p in universal}):
        return None
    found = _among(root, asked, tag, tags)
    if found is not None and universal:
        text = f"{fold([p.name for p in universal])} is there too: the ranks' own files are preferred"
        return Place(found.folder, f"{found.why}; {text}")
    return found


def _itself(root: Path, asked: str, tag: str | None) -> Place:
    if tag not in (None, root.name):
        raise UsageError("no-such-tag", f"this folder is the tag {show(root.name)}, not {show(tag)}", where=asked)
    return Place(root, "named by you")


def _among(root: Path, asked: str, tag: str | None, tags: list[Path]) -> Place | None:
    if tag is not None and tags:
        return _asked_tag(root, asked, tag, tags)
    if (root / LATEST).is_file():
        return _latest(root, asked, tags)
    if len(tags) == 1:
        return Place(tags[0], "the only one; there is no `latest`")
    if tags:
        raise UsageError(
            "several-checkpoints",
            f"{len(tags)} tags and no `latest` that says which",
            where=show(asked),
            expected=", ".join(show(p.name) for p in tags[-8:]),
            next=tagged(asked, tags[-1].name),
        )
    return _below(root, asked, tag)


def _asked_tag(root: Path, asked: str, tag: str, tags: list[Path]) -> Place:
    for folder in tags:
        if folder.name == tag:
            return Place(folder, "asked for with --tag")
    raise UsageError(
        "no-such-tag",
        f"there is no tag {show(tag)} with shards",
        where=show(asked),
        expected=", ".join(show(p.name) for p in tags[-8:]) or "a folder with shards",
    )


def _latest(root: Path, asked: str, tags: list[Path]) -> Place:
    name = _named_by(root / LATEST)
    for folder in tags:
        if folder.name == name:
            return Place(folder, "`latest` says so")
    if (refusal := other_layout(root / name)) is not None:
        raise refusal
    have = ", ".join(show(p.name) for p in tags[-8:])
    raise Refused(
        "zero-latest",
        f"`latest` names {show(name)}, and there are no shards of that name",
        where=show(asked),
        expected=have or "a folder with shards",
        next=tagged(asked, tags[-1].name) if tags else None,
    )


def _named_by(file: Path) -> str:
    """The folder that `latest` names."""
    raw = read_limited(file, limit=4096, root=file.parent)
    name = raw.decode("utf-8", "replace").strip()
    if not name or len(name) > MAX_TAG or "/" in name or "\0" in name or name in (".", ".."):
        raise Refused("zero-latest", f"`{file.name}` names no folder beside it", where=show(file), got=show(name))
    return name


def _below(root: Path, asked: str, tag: str | None) -> Place | None:
    """A run's folder: the checkpoints in it have the tags."""
    saved = _saved_below(root)
    if (chosen := next((p for p in saved if p.name == tag), None)) is not None:
        saved, tag = [chosen], None
    inside = _only(saved, asked)
    if inside is None:
        return None
    found = find_tag(inside, f"{asked.rstrip('/')}/{inside.relative_to(root)}", tag)
    return Place(found.folder, f"in {show(inside.name)}, the only checkpoint of the run; {found.why}")


def _saved_below(root: Path, depth: int = LIGHTNING_DEPTH) -> list[Path]:
    """A run's checkpoints that have tags in them: below its folder, or where Lightning puts them."""
    found = [p for p in _folders(root) if tags_in(p)]
    for below in lightning_folders(root) if depth and not found else ():
        found = found or _saved_below(below, depth - 1)
    return found


def _only(inside: list[Path], asked: str) -> Path | None:
    """The one checkpoint of a run, or None.

    Raises:
        UsageError: several to choose from (`several-checkpoints`).
    """
    if len(inside) > 1:
        listed = ", ".join(show(f"{asked.rstrip('/')}/{p.name}") for p in inside[-8:])
        what = f"a run folder with {len(inside)} checkpoints; name one of them"
        raise UsageError(
            "several-checkpoints", what, where=show(asked), expected=listed, next=tagged(asked, inside[-1].name)
        )
    return inside[0] if inside else None


def search_universal(root: Path, asked: str, tag: str | None = None) -> Place | None:
    """The universal checkpoint that is meant; None where there is none, or where ranks' files are preferred to it.

    Raises:
        UsageError: several to choose from (`several-checkpoints`), or no such tag.
        Refused: `latest_universal` names a folder that isn't there (`zero-latest`).
    """
    if is_universal(root):
        return _itself(root, asked, tag)
    if holds_ranks(root):
        return None
    found, tags = universal_in(root), tags_in(root)
    if tag is not None and any(p.name == tag for p in found):
        return Place(root / tag, "asked for with --tag")
    if tags:
        return None
    if not found:
        inside = _only([p for p in _folders(root) if universal_in(p) and not tags_in(p)], asked)
        place = None if inside is None else search_universal(inside, f"{asked.rstrip('/')}/{inside.name}", tag)
        if inside is None or place is None:
            return None
        return Place(place.folder, f"in {show(inside.name)}, the only checkpoint of the run; {place.why}")
    if tag is not None:
        return _asked_tag(root, asked, tag, found)
    if (root / LATEST_UNIVERSAL).is_file():
        name = _named_by(root / LATEST_UNIVERSAL)
        if all(p.name != name for p in found):
            text = f"`{LATEST_UNIVERSAL}` names {show(name)}, and there is no universal checkpoint of that name"
            raise Refused("zero-latest", text, where=show(asked), expected=", ".join(show(p.name) for p in found[-8:]))
        return Place(root / name, f"`{LATEST_UNIVERSAL}` says so")
    if len(found) > 1:
        raise UsageError(
            "several-checkpoints",
            f"{len(found)} universal checkpoints and no `{LATEST_UNIVERSAL}` that says which",
            where=show(asked),
            expected=", ".join(show(p.name) for p in found[-8:]),
        )
    return Place(found[0], f"the only one; there is no `{LATEST_UNIVERSAL}`")


def slices_in(folder: Path) -> list[int]:
    """Numbers of the ranks that a model was split over by layers or within tensors (`mp_rank_01`); else 0 alone."""
    matches = [m for n in file_names(folder) for m in (_MODEL.fullmatch(n), _OPTIMIZER.fullmatch(n)) if m is not None]
    return sorted({int(m[2]) for m in matches})


def rank_files(folder: Path, slice: int = 0) -> RankFiles:
    """The shard files of a tag's folder, by rank.

    Args:
        slice: of a model that was split over ranks by layers or within tensors: which part.

    Raises:
        Refused: one rank in two files or files of stage 3 among those of another stage (`zero-mixed`), another layout
            (see `other_layout`).
    """
    if (refusal := other_layout(folder)) is not None:
        raise refusal
    models: dict[int, str] = {}
    optimizers: dict[int, str] = {}
    whole: list[str] = []
    for name in sorted(file_names(folder)):
        for pattern, found in ((_MODEL, models), (_OPTIMIZER, optimizers)):
            match = pattern.fullmatch(name)
            if match is None or int(match[2]) != slice:
                continue
            if match[1] is None:
                whole.append(name)
            elif int(match[1]) in found:
                text = f"{show(name)} and {show(found[int(match[1])])} are of one rank: two runs saved into this folder"
                raise Refused("zero-mixed", text, where=show(folder))
            else:
                found[int(match[1])] = name
    if whole and models:
        text = f"{show(whole[0])} is of stages 0 to 2, {fold(models.values())} of stage 3: two runs saved into it"
        raise Refused("zero-mixed", text, where=show(folder))
    return RankFiles(
        folder, whole[0] if whole else None, dict(sorted(models.items())), dict(sorted(optimizers.items()))
    )


def run_folders(tag_folder: Path) -> list[Path]:
    """Where config and tokenizer may lie: beside the shards, above them, and above a trainer's `checkpoint-N`."""
    folders = [tag_folder, tag_folder.parent]
    if _TRAINER_FOLDER.fullmatch(tag_folder.parent.name):
        folders.append(tag_folder.parent.parent)
    for above, folder in enumerate((tag_folder, tag_folder.parent)):
        if folder.suffix == ".ckpt":  # Lightning's, some folders below the run's top
            folders += list(tag_folder.parents)[1 : LIGHTNING_DEPTH + 1 + above]
    return folders


def holds_experts(names: Iterable[str]) -> bool:
    """True where files of experts are among these."""
    return any(EXPERT_FILE.fullmatch(n) for n in names)
