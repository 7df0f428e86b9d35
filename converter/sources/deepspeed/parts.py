"""Runs that keep several models side by side: OpenRLHF's PPO saves `_actor` and `_critic`, each a DeepSpeed checkpoint.

Source: https://github.com/OpenRLHF/OpenRLHF/blob/v0.8.5/openrlhf/trainer/ray/ppo_actor.py (`save_checkpoint` into
`os.path.join(args.ckpt_path, "_actor")`) and ppo_critic.py beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from converter.diagnostic import Again, Command
from converter.errors import UsageError
from converter.sources.deepspeed.files import search_tag, tags_in
from converter.sources.places import Place
from converter.text import show

_FOLDERS: Mapping[str, str] = {"actor": "_actor", "critic": "_critic"}
_OTHER_NAMES: Mapping[str, str] = {"policy": "actor", "value": "critic"}


def parts_in(root: Path) -> dict[str, Path]:
    """Folders of a run's models that hold shards, by what `--part` calls them."""
    found = {part: root / name for part, name in _FOLDERS.items() if (root / name).is_dir()}
    return {part: folder for part, folder in found.items() if tags_in(folder)}


def find_in_part(parts: Mapping[str, Path], asked: str, *, tag: str | None, part: str | None) -> Place | None:
    """The tag's folder in the part that is meant.

    Raises:
        UsageError: several to choose from (`several-parts`), or no such part (`no-such-part`).
    """
    listed = ", ".join(parts)
    if part is None and len(parts) > 1:
        first = "actor" if "actor" in parts else next(iter(parts))
        raise UsageError(
            "several-parts",
            f"{len(parts)} models of a trainer; say which",
            where=show(asked),
            expected=f"--part with one of {listed}",
            offers=parts,
            next=Again(("--part", first), otherwise=Command("gather", (asked, "OUT", "--part", first))),
        )
    name = next(iter(parts)) if part is None else _OTHER_NAMES.get(part, part)
    if name not in parts:
        raise UsageError("no-such-part", f"there is no {show(part)} in it", where=show(asked), expected=listed)
    found = search_tag(parts[name], f"{asked.rstrip('/')}/{parts[name].name}", tag)
    return None if found is None else Place(found.folder, f"the {name}: {found.why}")
