"""A folder of an object store as a folder here: every object has its name and its size, and its bytes come when they
are read. See `converter.sources.hub.mirror`, which does the same for repositories.
"""

from __future__ import annotations

import functools
from pathlib import Path

from converter.core.files import sparse
from converter.core.files.origins import Origin
from converter.errors import Refused
from converter.sources.hub.mirror import LARGEST_TEXT, SMALL, workspace
from converter.sources.store_names import StoreName
from converter.sources.stores.client import Object, Store
from converter.sources.survey import is_weight_file


def store_mirror(place: StoreName) -> Path:
    """A folder with the objects below a name.

    Raises:
        Refused: the store can't be read (`store-read`), or has nothing of that name (`path-missing`).
    """
    folder = workspace() / "stores" / place.scheme / place.bucket / place.folder
    if str(folder) in sparse.folders:
        return folder
    store = Store(place)
    objects = store.objects()
    if not objects:
        raise Refused("path-missing", "the store has nothing below this name", where=str(place), next="check the name")
    sparse.folders[str(folder)] = str(place)
    for each in objects:
        _add(folder, each, store)
    return folder


def _add(folder: Path, each: Object, store: Store) -> None:
    path = folder / each.name
    if path.exists():  # listed with a folder above or below this one
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = not is_weight_file(path.name) and path.suffix != ".distcp" and each.size <= LARGEST_TEXT
    origin = Origin(str(store.place), "", each.name, None, "", mark=each.mark)
    sparse.add(
        sparse.SparseFile(
            path,
            each.size,
            functools.partial(store.read, each),
            origin,
            is_whole=each.size <= SMALL or is_text,
            expect_same=functools.partial(store.expect_same, each),
        )
    )
