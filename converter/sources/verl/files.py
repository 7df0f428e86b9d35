"""verl's checkpoint folders by their names: which step, which part of the trainer, which ranks.

A run's folder holds `global_step_N/` and `latest_checkpointed_iteration.txt`; a step holds a folder for each part
(`actor`, `critic`), but the shards themselves where supervised fine-tuning saved it.

Source of the names: https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/checkpoint/fsdp_checkpoint_manager.py and
`find_latest_ckpt_path` in checkpoint_manager.py beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from converter.core.files.opening import read_limited
from converter.core.files.strict_json import load_json
from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.sources.places import Place, by_number
from converter.sources.survey import file_names, is_weights_of_model
from converter.text import fold, show

TRACKER = "latest_checkpointed_iteration.txt"
_TRACKERS = (TRACKER, "latest_ckpt_global_step.txt")
"""Files that name a run's last complete step: verl's, and SkyRL's, which saves the same files of ranks."""
HUGGINGFACE = "huggingface"
FSDP_CONFIG = "fsdp_config.json"
LORA_ADAPTER = "lora_adapter"
_STEP = re.compile(r"global_step_(\d{1,9})", re.ASCII)
_RANK = re.compile(r"(model|optim)_world_size_(\d{1,6})_rank_(\d{1,6})\.pt", re.ASCII)
_PARTS = ("actor", "critic", "ref", "reward")
# What a user may call them: the names of other trainers.
_OTHER_NAMES = {"policy": "actor", "value": "critic", "rm": "reward", "reward_model": "reward", "reference": "ref"}


@dataclass(frozen=True)
class RankFiles:
    """The files of one part's ranks.

    Attributes:
        world: ranks that saved.
        models: model files by rank.
        optimizers: optimizer files by rank.
    """

    folder: Path
    world: int
    models: dict[int, str]
    optimizers: dict[int, str]
    said: list[str] = field(default_factory=list)

    def missing(self, files: Collection[int]) -> list[int]:
        """Ranks that are not among these."""
        return [r for r in range(self.world) if r not in files]


def holds_ranks(folder: Path) -> bool:
    """True where FSDP ranks' model files are in the folder itself."""
    return any((m := _RANK.fullmatch(n)) is not None and m[1] == "model" for n in file_names(folder))


def _folders(root: Path) -> list[Path]:
    try:
        return sorted((p for p in root.iterdir() if p.is_dir()), key=by_number)
    except OSError:
        return []


def parts_in(step: Path) -> list[Path]:
    """Folders below a step that hold ranks' files."""
    return [p for p in _folders(step) if not _STEP.fullmatch(p.name) and holds_ranks(p)]


def _is_step(folder: Path) -> bool:
    return holds_ranks(folder) or bool(parts_in(folder))


def steps_in(root: Path) -> list[Path]:
    """Folders below a run's that hold a checkpoint, by number."""
    return [p for p in _folders(root) if _STEP.fullmatch(p.name) and _is_step(p)]


def find_part(root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
    """The folder with the ranks' files that a user means by it, by its step or by the run's folder.

    Raises:
        UsageError: several to choose from (`several-checkpoints`, `several-parts`), no such step or part
            (`no-such-tag`, `no-such-part`).
        Refused: the run's tracker names a step that isn't there (`verl-latest`).
    """
    if root.name == HUGGINGFACE and holds_ranks(root.parent) and not is_weights_of_model(file_names(root)):
        found = _checked_part(root.parent, asked, part)
        return Place(found.folder, f"its {HUGGINGFACE}/ holds only config and tokenizer; the shards are above it")
    if holds_ranks(root):
        step = root if _STEP.fullmatch(root.name) else root.parent
        _expect_step(step, asked, tag)
        return _checked_part(root, asked, part)
    if parts_in(root):
        _expect_step(root, asked, tag)
        return _part_of(root, asked, part)
    place = _step_of(root, asked, tag)
    if place is None:
        return None
    if holds_ranks(place.folder):
        _checked_part(place.folder, asked, part)
        return place
    found = _part_of(place.folder, f"{asked.rstrip('/')}/{place.folder.name}", part)
    return Place(found.folder, f"{place.why}; {found.why}")


def find_step(root: Path, asked: str, *, tag: str | None = None) -> tuple[Place, list[Path]]:
    """A step with all of its parts' folders, or the part that a user named.

    Raises:
        UsageError: nothing (`no-shards`), several to choose from (`several-checkpoints`), no such step (`no-such-tag`).
        Refused: the run's tracker names a step that isn't there (`verl-latest`).
    """
    if holds_ranks(root):
        _expect_step(root if _STEP.fullmatch(root.name) else root.parent, asked, tag)
        return Place(root, "named by you"), [root]
    if parts_in(root):
        _expect_step(root, asked, tag)
        return Place(root, "named by you"), parts_in(root)
    place = _step_of(root, asked, tag)
    if place is None:
        raise UsageError("no-shards", "there are no model files of verl's ranks here", where=show(asked))
    return place, [place.folder] if holds_ranks(place.folder) else parts_in(place.folder)


def _expect_step(step: Path, asked: str, tag: str | None) -> None:
    if tag is not None and tag not in _words(step):
        what = f"this folder is the step {show(step.name)}, not {show(tag)}"
        raise UsageError("no-such-tag", what, where=show(asked))


def _words(step: Path) -> tuple[str, ...]:
    """A step's name and its number."""
    match = _STEP.fullmatch(step.name)
    return (step.name, match[1]) if match else (step.name,)


def _checked_part(folder: Path, asked: str, part: str | None) -> Place:
    """The part that a user named by its folder, which must be the one asked for, where its name tells."""
    wanted = None if part is None else _OTHER_NAMES.get(part, part)
    # Fine-tuning saves its one model, a policy, without a folder of its own.
    is_one = _STEP.fullmatch(folder.name) is not None
    own = "actor" if is_one else folder.name if folder.name in _PARTS else None
    if wanted is not None and (wanted != own if own is not None else wanted not in _PARTS):
        words = "a step with one model, as fine-tuning saves it" if is_one else f"the {show(folder.name)}"
        raise UsageError("no-such-part", f"this folder is {words}, not the {show(part)}", where=show(asked))
    return Place(folder, "named by you")


def _part_of(step: Path, asked: str, part: str | None) -> Place:
    parts = {p.name: p for p in parts_in(step)}
    listed = ", ".join(show(n) for n in parts)
    if part is not None:
        name = part if part in parts else _OTHER_NAMES.get(part, part)
        if name not in parts:
            raise UsageError("no-such-part", f"there is no {show(part)} in it", where=show(asked), expected=listed)
        found = Place(parts[name], f"the {show(name)}, asked for with --part")
    elif len(parts) > 1:
        first = "actor" if "actor" in parts else next(iter(parts))
        raise UsageError(
            "several-parts",
            f"{len(parts)} parts of a trainer; say which",
            where=show(asked),
            expected=f"--part with one of {listed}",
            offers=parts,
            next=Again(("--part", first), otherwise=Command("gather", (asked, "OUT", "--part", first))),
        )
    else:
        ((name, folder),) = parts.items()
        found = Place(folder, f"the {show(name)}, the only part that was saved")
    return found


def _step_of(root: Path, asked: str, tag: str | None) -> Place | None:
    """A run's step: as asked, as its tracker says, or the only one."""
    steps = steps_in(root)
    if not steps:
        return None
    listed = ", ".join(show(p.name) for p in steps[-8:])
    if tag is not None:
        chosen = next((p for p in steps if tag in _words(p)), None)
        if chosen is None:
            raise UsageError("no-such-tag", f"there is no step {show(tag)}", where=show(asked), expected=listed)
        return Place(chosen, "asked for with --tag")
    for tracker in _TRACKERS:
        if (root / tracker).is_file():
            return _tracked(root, asked, steps, tracker)
    if len(steps) > 1:
        raise UsageError(
            "several-checkpoints",
            f"{len(steps)} steps and no {TRACKER} that says which",
            where=show(asked),
            expected=listed,
            next=_tagged(asked, steps[-1].name),
        )
    return Place(steps[0], f"the only step; there is no {TRACKER}")


def _tracked(root: Path, asked: str, steps: list[Path], tracker: str) -> Place:
    text = read_limited(root / tracker, limit=4096, root=root).decode("utf-8", "replace").strip()
    name = f"global_step_{text}"
    newer = [p.name for p in steps if by_number(p)[0] > [int(text)]] if text.isdecimal() and len(text) < 10 else []
    for step in steps:
        if step.name == name:
            rest = f" ({fold(newer)} came later)" if newer else ""
            return Place(step, f"{tracker} says so{rest}")
    raise Refused(
        "verl-latest",
        f"{tracker} says {show(text)}, and there is no checkpoint of that step",
        where=show(asked),
        expected=", ".join(show(p.name) for p in steps[-8:]),
        next=_tagged(asked, steps[-1].name),
    )


def rank_files(folder: Path) -> RankFiles:
    """The ranks' files of one run.

    Raises:
        Refused: files of runs with several numbers of ranks, and nothing says which is meant (`verl-mixed`).
    """
    found: dict[int, RankFiles] = {}
    for name in sorted(file_names(folder)):
        match = _RANK.fullmatch(name)
        if match is not None:
            files = found.setdefault(int(match[2]), RankFiles(folder, int(match[2]), {}, {}))
            (files.models if match[1] == "model" else files.optimizers)[int(match[3])] = name
    worlds = sorted(w for w, f in found.items() if f.models)
    recorded = _recorded_world(folder)
    if recorded is not None and recorded not in worlds:
        have = ", ".join(map(str, worlds)) or "none"
        text = f"{FSDP_CONFIG} says that {recorded} ranks saved; the model files are of a run with {have}"
        raise Refused("verl-mixed", text, where=show(folder), next="put the files of one run into one folder")
    if recorded is None and len(worlds) > 1:
        text = f"model files of runs with {' and '.join(map(str, worlds))} ranks are here, and no {FSDP_CONFIG}"
        raise Refused("verl-mixed", text, where=show(folder), next="move those of the older run elsewhere")
    world = worlds[0] if recorded is None else recorded
    files = found[world]
    beyond = sorted(r for r in files.models if r >= world)
    if beyond:
        text = f"{fold([files.models[r] for r in beyond])}: there is no such rank among {world}"
        raise Refused("verl-mixed", text, where=show(folder))
    stale = [n for w, other in sorted(found.items()) if w != world for n in (*other.models.values(),)]
    if stale:
        files.said.append(f"left over from a run with another number of ranks, not read: {fold(stale)}")
    return files


def _recorded_world(folder: Path) -> int | None:
    """What `fsdp_config.json` says; older versions (before 0.4) did not write it."""
    path = folder / FSDP_CONFIG
    if not path.is_file():
        return None
    value = load_json(path)
    world = value.get("world_size") if isinstance(value, dict) else None
    return world if type(world) is int and world > 0 else None


def _tagged(asked: str, tag: str) -> Again:
    """The user's command with a tag."""
    return Again(("--tag", tag), otherwise=Command("gather", (asked, "OUT", "--tag", tag)))
