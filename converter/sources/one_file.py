"""Weights in a file of a script's own: `checkpoint.pt`, `rm_weights.safetensors`, with or without an optimizer beside.

No loader reads such a name, and nothing in the file says which model it is of. It is a trainer's state to `gather`: the
config and the tokenizer come from what lies beside it or from the base that the user names, and what is gathered has to
be exactly what that config asks for.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from converter.core.checkpoint import TRAINING, Checkpoint
from converter.core.files.names import ADAPTER_CONFIG
from converter.core.formats.weight_file import PICKLED_SUFFIXES
from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.sources.beside import find_beside
from converter.sources.hf.loose import open_file
from converter.sources.places import Place
from converter.sources.survey import file_names, folder_kind, is_weight_file, other_weights, snapshot_of
from converter.text import show


def names_in(folder: Path) -> list[str]:
    """Files of weights in a folder without a model's or an adapter's own, by name; optimizers' and the like are not."""
    names = file_names(folder)
    if folder_kind(names) is not None or ADAPTER_CONFIG in names:
        return []
    return [n for n in other_weights(names, ()) if n.endswith((".safetensors", *PICKLED_SUFFIXES))]


def is_one(path: Path) -> bool:
    """True for such a file."""
    return is_weight_file(path.name) and path.name in names_in(path.parent)


def place_in(root: Path, asked: str, tag: str | None) -> Place | None:
    """The file that is meant; None where there is none.

    Raises:
        UsageError: several to choose from (`several-checkpoints`), or not the one asked for (`no-such-tag`).
    """
    if root.is_file():
        return Place(root, "named by you") if is_one(root) else None
    names = [n for n in names_in(root) if tag is None or tag in (n, n.rpartition(".")[0])]
    held = [n for n in names if _holds_tensors(root / n)] if len(names) > 1 else names
    if len(held) < 2:
        return Place(root / held[0], "the only file of weights") if held else None
    raise UsageError(
        "several-checkpoints",
        f"{len(held)} files of weights; name one of them",
        where=show(asked),
        expected=", ".join(map(show, held[-8:])),
        next=Again(("--tag", held[-1]), otherwise=Command("gather", (asked, "OUT", "--tag", held[-1]))),
    )


def open_one(path: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
    """The tensors of such a file, with the config and the tokenizer that lie beside it.

    Raises:
        Refused: what is wrong with the file.
    """
    found = open_file(path, asked)
    beside = find_beside([path.parent], keep_code=keep_code)
    real = path.resolve()
    name, commit = snapshot_of(path.parent) or (f"{real.parent.name}/{real.name}", revision)
    origin = dataclasses.replace(
        found.origin,
        kind=TRAINING,
        path=str(real.parent),
        name=name,
        revision=commit,
        stored_format="a file of weights",
    )
    return dataclasses.replace(
        found,
        origin=origin,
        config=beside.config,
        config_bytes=beside.config_bytes,
        side_files=beside.files,
        inputs={**found.inputs, **beside.inputs},
        said=(*found.said, *beside.said),
    )


def _holds_tensors(path: Path) -> bool:
    """True for a file that has to be looked at further: one that is broken is told of by whoever opens it."""
    try:
        return bool(open_file(path, str(path)).tensors)
    except Refused as error:
        return error.code != "pickled-not-weights"
