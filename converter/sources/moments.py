"""Adam's moments of a trainer's checkpoint, by parameter: for those who go on training, or look at what was learned."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.errors import Refused, UsageError
from converter.sources.finding import KeepsMoments, find_place, kind_of, sources
from converter.text import show

if TYPE_CHECKING:
    from os import PathLike

    from converter.core.tensors.nodes import LazyTensor


def adam_moments(
    path: str | PathLike[str],
    *,
    which: Literal["exp_avg", "exp_avg_sq"],
    tag: str | None = None,
    part: str | None = None,
    allow: Collection[str] = (),
) -> dict[str, LazyTensor]:
    """Adam's first or second moment of every trained parameter, by its name in memory; `to_torch` gives values.

    Args:
        path: what `gather` takes: a tag's folder, its parent, or the run's folder.
        tag: which tag; None: what `latest` says.
        part: which model, where a trainer keeps several.
        allow: codes of refusals to overrule, as in `--allow`.

    Raises:
        UsageError: no such folder, no trainer's state in it, or several to choose from.
        Refused: this trainer's moments can't be read (`no-moments`), or files are missing, mixed or malformed.
    """
    root = Path(path).expanduser()
    asked = str(path)
    if not root.is_dir():
        raise UsageError("no-such-folder", "there is no such folder", where=show(asked))
    place = find_place(root, asked, tag=tag, part=part)
    kind = kind_of(place.folder)
    source: object = None if kind is None else sources()[kind]
    if not isinstance(source, KeepsMoments):
        source = sys.modules[type(source).__module__]
    if not isinstance(source, KeepsMoments):
        raise Refused("no-moments", f"moments of this checkpoint ({kind}) are not read", where=show(place.folder))
    if allow:
        return source.adam_moments(place.folder, which=which, allow=allow)
    return source.adam_moments(place.folder, which=which)
