"""What `check` does: doctor for every checkpoint that files or folders of a repository belong to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import ConvertError, UsageError
from converter.text import show

_LATER = re.compile(r"(?:checkpoint|epoch|step)[-_]?\d+", re.ASCII)
"""A trainer's checkpoint in the folder of its last one. A `global_step` below a checkpoint is a part of it."""

if TYPE_CHECKING:
    from converter.recipe.verbs.knobs import Where
    from converter.recipe.verbs.watch import Examined


def check(
    paths: Sequence[Where], *, for_: str | None = None, deep: bool = False, ignore: Sequence[str] = ()
) -> tuple[Examined, ...]:
    """Every checkpoint that the paths name or lie in, examined, in the order of their names.

    A file stands for the folder that it is in, as commits name files; a folder for itself, or, where it is not a
    checkpoint, for all checkpoints below it. Folders that are not checkpoints, hidden ones and links are passed over.

    Args:
        paths: files and folders.
        for_: a trainer: what its loader does with each.
        deep: read values too.
        ignore: codes to leave out.

    Raises:
        UsageError: a path is not there (`path-missing`), or the trainer or a code is unknown.
    """
    from converter.recipe.verbs.watch import examined

    codes = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    found = dict.fromkeys(folder for path in paths for folder in _checkpoints(Path(path).expanduser()))
    return tuple(examined(str(f), {"for_": for_, "deep": deep, "ignore": codes}) for f in sorted(found))


def _checkpoints(path: Path) -> Iterator[Path]:
    """Folders of checkpoints that a path stands for."""
    if not os.path.lexists(path):
        raise UsageError("path-missing", "there is no such file or folder", where=show(str(path)))
    if not path.is_dir():
        if _is_checkpoint(path.parent):
            yield path.parent
        return
    for name, names, _ in os.walk(path):
        folder = Path(name)
        is_one = _is_checkpoint(folder)
        if is_one:
            yield folder
        # Below a checkpoint lie its own parts, and a trainer's intermediate checkpoints.
        names[:] = sorted(n for n in names if not n.startswith(".") and (not is_one or _LATER.fullmatch(n)))


def _is_checkpoint(folder: Path) -> bool:
    """True for a folder with weights, or with files that say that weights belong there."""
    from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG
    from converter.core.files.strict_json import load_json
    from converter.sources.finding import kind_of
    from converter.sources.survey import file_names, is_weight_file

    names = file_names(folder)
    if any(map(is_weight_file, names)) or ADAPTER_CONFIG in names:
        return True
    if MODEL_CONFIG not in names:
        return kind_of(folder) is not None
    try:
        config = load_json(folder / MODEL_CONFIG)
    except ConvertError:
        return False  # of whatever program
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)
