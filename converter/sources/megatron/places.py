"""Where in a run's folder Megatron's checkpoint lies: by step, by part of the trainer, by the trainer's own folders.

- Megatron-LM, slime: `RUN/iter_0000010`, `RUN/release`
- verl: `RUN/global_step_10/actor/dist_ckpt`, since 0.9 `RUN/global_step_10/actor/model/dist_ckpt`
- Megatron-Bridge, NeMo-RL: `RUN/iter_0000000`, `RUN/step_10/policy/weights/iter_0000000`
- ms-swift: `RUN/checkpoint-10/iter_0000010`
- ROLL: `RUN/iter_0000001/dist_model`
"""

from __future__ import annotations

import re
from pathlib import Path

from converter.errors import UsageError
from converter.sources.megatron_files import kind_here, tracked
from converter.sources.places import Place, by_number, several_checkpoints, several_parts, tagged
from converter.text import show

DEPTH = 5
TRACKERS = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt")
STEP = re.compile(r"(?:iter|global_step|step|checkpoint)[-_](\d+)|release", re.ASCII)
_INNER = frozenset({"dist_ckpt", "dist_model", "model", "weights"})
"""Folders that trainers put around a checkpoint; those of an optimizer alone (`dist_optimizer`) are others."""
_PARTS = {
    "actor": "actor", "policy": "actor", "critic": "critic", "value": "critic", "ref": "ref", "reference": "ref",
    "reward": "reward", "rm": "reward", "reward_model": "reward",
}  # fmt: skip
"""Folders of parts, and words for them, by what they mean."""


def folders(root: Path) -> list[Path]:
    """Folders in which a model may lie, by their names; an optimizer's own is none, though it has the same files."""
    try:
        return sorted((p for p in root.iterdir() if _is_on_the_way(p.name) and p.is_dir()), key=by_number)
    except OSError:
        return []


def _is_on_the_way(name: str) -> bool:
    return name in _INNER or name in _PARTS or STEP.fullmatch(name) is not None


def holds(folder: Path, depth: int = DEPTH) -> bool:
    """True where one of Megatron's checkpoints lies in a folder or below it."""
    if kind_here(folder) is not None:
        return True
    return depth > 0 and any(holds(p, depth - 1) for p in folders(folder))


def search(root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
    """The checkpoint's folder that a user means, in `root` or below it; None where there is none.

    Raises:
        UsageError: several to choose from (`several-checkpoints`, `several-parts`), or not the one asked for
            (`no-such-tag`, `no-such-part`).
    """
    if kind_here(root) is not None:
        return _named(root, asked, tag, part)
    below = [p for p in folders(root) if holds(p, DEPTH - 1)]
    steps = [p for p in below if STEP.fullmatch(p.name)]
    if not below:
        return None
    if steps:
        one, why = _step(root, steps, asked, tag)
        inner = search(one, f"{asked.rstrip('/')}/{one.name}", part=part)
    else:
        one, why = _inside(below, asked, part)
        left = None if _PARTS.get(one.name) is not None and part is not None else part
        inner = search(one, f"{asked.rstrip('/')}/{one.name}", tag=tag, part=left)
    assert inner is not None
    said = "" if inner.why == _NAMED else inner.why
    return Place(inner.folder, "; ".join(w for w in (why, said) if w))


_NAMED = "named by you"


def _named(root: Path, asked: str, tag: str | None, part: str | None) -> Place:
    """The folder itself, which must be what was asked for where its path tells."""
    around = (root.name, *(p.name for p in list(root.parents)[:4]))
    steps = [n for n in around if STEP.fullmatch(n)]
    if tag is not None and tag not in around and not any(_is_tag(n, tag) for n in steps):
        what = f"this folder is the checkpoint {show(steps[0] if steps else root.name)}, not {show(tag)}"
        raise UsageError("no-such-tag", what, where=show(asked))
    own = next((_PARTS[n] for n in around if n in _PARTS), None)
    if part is not None and own is not None and _PARTS.get(part, part) != own:
        raise UsageError("no-such-part", f"this folder is the {own}'s, not the {show(part)}'s", where=show(asked))
    return Place(root, _NAMED)


def _is_tag(name: str, tag: str) -> bool:
    match = STEP.fullmatch(name)
    is_number = match is not None and match[1] is not None and tag.isdecimal() and len(tag) < 12
    return name == tag or (is_number and match is not None and int(match[1]) == int(tag))


def _step(root: Path, steps: list[Path], asked: str, tag: str | None) -> tuple[Path, str]:
    """One checkpoint of a run, and why it is that one."""
    if tag is not None:
        chosen = next((p for p in steps if _is_tag(p.name, tag)), None)
        if chosen is None:
            listed = ", ".join(show(f"{asked.rstrip('/')}/{p.name}") for p in steps[-8:])
            raise UsageError("no-such-tag", f"there is no checkpoint {show(tag)}", where=show(asked), expected=listed)
        return chosen, "asked for with --tag"
    for tracker in TRACKERS:
        said = tracked(root / tracker, root)
        latest = [p for p in steps if said and _is_tag(p.name, said)]
        if len(latest) == 1 and len(steps) > 1:
            return latest[0], f"{show(latest[0].name)}: `{tracker}` says so"
        if said and not latest:
            listed = ", ".join(show(f"{asked.rstrip('/')}/{p.name}") for p in steps[-8:])
            what = f"`{tracker}` names {show(said, 40)}, which is not here: it was deleted, or not copied"
            raise UsageError(
                "no-such-tag", what, where=show(asked), expected=listed, next=tagged(asked, steps[-1].name)
            )
    if len(steps) == 1:
        return steps[0], f"{show(steps[0].name)} is the only checkpoint of the run"
    raise several_checkpoints(asked, steps)


def _inside(below: list[Path], asked: str, part: str | None) -> tuple[Path, str]:
    """The one folder of those that are no steps: the model's, or a part's."""
    if len(below) == 1 and below[0].name not in _PARTS:
        return below[0], ""
    listed = ", ".join(show(p.name) for p in below[:8])
    wanted = None if part is None else _PARTS.get(part, part)
    chosen = [p for p in below if wanted is None or _PARTS.get(p.name, p.name) == wanted or p.name == part]
    if not chosen:
        raise UsageError("no-such-part", f"there is no {show(part)} in it", where=show(asked), expected=listed)
    if len(chosen) > 1:
        raise several_parts(asked, chosen)
    (one,) = chosen
    return one, f"the {show(one.name)}" if part else f"the {show(one.name)}, the only part that was saved"
