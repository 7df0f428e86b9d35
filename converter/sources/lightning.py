"""Lightning's checkpoints in one file: `epoch=1-step=8.ckpt`, `last.ckpt`, by `torch.save`.

The model is in `state_dict`, under the name of the module's attribute (`model.`, `net.`), which `gather` takes off
where what remains fits the model. Callbacks, loops, hyper-parameters and optimizers lie beside it: they are read as
data, never built, and not taken. Such a file stands for itself: what a user names is the file, or a folder above it.

Source: `dump_checkpoint`,
https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.0/src/lightning/pytorch/trainer/connectors/checkpoint_connector.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.core.checkpoint import Checkpoint, Origin
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.sources.base import Held, TrainingSource
from converter.sources.beside import find_beside
from converter.sources.places import LIGHTNING_DEPTH, Place, by_number, lightning_folders
from converter.sources.survey import file_names, folder_kind, snapshot_of
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.core.formats.torch_file import TorchFile

CKPT = re.compile(r"(?:[\w.,=+ -]*(?:epoch|step)[\w.,=+ -]*|last(?:-v\d+)?)\.ckpt", re.ASCII)
_LAST = "last.ckpt"
_ANY_NAME = re.compile(r"[\w.]+")
"""Hyper-parameters may hold anything of the user's; what runs code is refused all the same."""
_ABOVE = 4
"""Folders above a file in which a run's config.json may lie: `RUN/lightning_logs/version_0/checkpoints`."""


def files_in(root: Path, depth: int = LIGHTNING_DEPTH) -> list[Path]:
    """Checkpoints in a folder, or where Lightning puts them below it; the newest version's where there are several."""
    if root.is_file():
        return [root] if root.name.endswith(".ckpt") else []
    names = file_names(root)
    if folder_kind(names) is not None:
        return []
    if found := sorted((root / n for n in names if CKPT.fullmatch(n)), key=by_number):
        return found
    for below in lightning_folders(root) if depth else ():
        if found := files_in(below, depth - 1):
            return found
    return []


def search(root: Path, asked: str, tag: str | None = None) -> Place | None:
    """The file that a user means.

    Raises:
        UsageError: several to choose from (`several-checkpoints`), or not the one asked for (`no-such-tag`).
    """
    found = files_in(root)
    if not found:
        return None
    listed = ", ".join(show(p.name) for p in found[-8:])
    if tag is not None:
        named = [p for p in found if tag in (p.name, p.stem)]
        if not named:
            raise UsageError("no-such-tag", f"there is no {show(tag)} here", where=show(asked), expected=listed)
        return Place(named[0], "asked for with --tag" if root != named[0] else "named by you")
    if len(found) == 1:
        return Place(found[0], "named by you" if root == found[0] else "the only checkpoint of the run")
    if last := [p for p in found if p.name == _LAST]:
        return Place(last[0], f"{_LAST}: what Lightning saved last")
    newest = found[-1].name
    raise UsageError(
        "several-checkpoints",
        f"a run folder with {len(found)} checkpoints; name one of them",
        where=show(asked),
        expected=listed,
        next=Again(("--tag", newest), otherwise=Command("gather", (asked, "OUT", "--tag", newest))),
    )


class LightningSource(TrainingSource):
    """What Lightning's Trainer saved in one file."""

    name = "lightning"

    def detect(self, root: Path) -> str | None:
        """Why a path is of this source, or None; names of files tell."""
        found = files_in(root)
        return f"Lightning's {show(found[-1].name)} is there" if found else None

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The checkpoint's file; see `search`."""
        return search(root, asked, tag)

    def held(self, root: Path) -> Held:
        """Tensors of the module.

        Raises:
            UsageError: several checkpoints to choose from.
            Refused: not a file of torch.save, naming code, or without a module's state (`lightning-malformed`).
        """
        file = _chosen(root, show(root)).folder
        tensors, _, said = _read(file)
        return Held(file.parent, [file.name], tensors, said)

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The module's weights, with config and tokenizer that lie in the run.

        Raises:
            UsageError: several checkpoints to choose from.
            Refused: see `held`.
        """
        place = _chosen(root, asked)
        file = place.folder
        tensors, read, said = _read(file)
        beside = find_beside([file.parent, *list(file.parent.parents)[: _ABOVE - 1]], keep_code=keep_code)
        told = [f"{show(file.name)}: {place.why}"] if file != root else []
        real = file.resolve()
        name, commit = snapshot_of(file.parent) or (f"{real.parent.name}/{real.name}", revision)
        return Checkpoint(
            tensors=tensors,
            config=beside.config,
            origin=Origin(self.kind, str(real.parent), asked, name, commit, read.digest, "Lightning, one file"),
            side_files=beside.files,
            config_bytes=beside.config_bytes,
            inputs=beside.inputs | {str(file.absolute()): read.identity},
            checks=read.checks,
            said=(*told, *said, *beside.said),
        )


def _chosen(root: Path, asked: str) -> Place:
    found = search(root, asked)
    if found is None:
        raise UsageError("no-shards", "there is no checkpoint of Lightning here", where=show(asked))
    return found


def _read(file: Path) -> tuple[dict[str, LazyTensor], TorchFile, list[str]]:
    """The module's tensors, the file, and what was not taken."""
    from converter.core.formats.torch_file import read_torch_file, state_dict

    read = read_torch_file(file, root=file.parent, allow_names=_ANY_NAME)
    value: Any = read.value
    inner = value.get("state_dict") if isinstance(value, dict) else None
    held = inner if isinstance(inner, dict) else value if isinstance(value, dict) else {}
    found = state_dict({n: t for n, t in held.items() if isinstance(t, LazyTensor)}) if held else None
    if not found:
        raise Refused(
            "lightning-malformed",
            "the file holds no state of a module: neither `state_dict` nor tensors by name",
            where=show(file),
            expected="what Lightning's Trainer saves",
        )
    others = [show(str(n)) for n, t in held.items() if not isinstance(t, LazyTensor)]
    said = [f"not tensors of the module, and not taken: {fold(others)}"] if others and inner is not None else []
    return dict(found), read, said


SOURCE = LightningSource()
