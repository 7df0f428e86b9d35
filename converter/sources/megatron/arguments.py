"""What Megatron's training script was called with (`args`), read as data: numbers and words, whatever their classes.

Until megatron-core 0.18 it is in `common.pt`; since 0.19 in a record of the distributed checkpoint, as a list of one.
Nothing that a conversion writes is taken from it: it is compared with config.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.core.files.opening import Identity, open_input
from converter.core.formats.pickle_machine import PickleValue, check_names
from converter.core.formats.pickle_values import Built, Global
from converter.core.formats.torch_container import read_container, read_member
from converter.families.megatron.names import Value
from converter.sources.dcp.metadata import Metadata
from converter.sources.megatron_files import COMMON, expect_own_name
from converter.sources.survey import file_names
from converter.text import show

COMMON_STATE = "common_state/shard_0_1"
"""The key of the same in a distributed checkpoint."""

ANY = re.compile(r"[\w.<>]+", re.ASCII)
"""Names of a trainer's own classes: any that runs no code."""
_HARMLESS = frozenset({"functools.partial"})
"""How configs keep a function for initialising weights; it says nothing and does nothing here."""


def read_arguments(metadata: Metadata) -> tuple[dict[str, Value] | None, dict[str, Identity]]:
    """The arguments that a checkpoint records, those that are plain values, and the files that were read for them.

    None where there are none: verl, AReaL and Megatron-Bridge do not save them.

    Raises:
        Refused: malformed, or naming code that no checkpoint needs (`pickle-names`), nothing of it is run; of another
            iteration than the folder (`megatron-mixed`).
    """
    folder = metadata.folder
    if COMMON in file_names(folder):
        path = folder / COMMON
        container = read_container(path, root=folder)
        return _arguments(container.pickle, path, folder), {str(path.absolute()): container.identity}
    place = metadata.places.get((COMMON_STATE, ()))
    if place is None:
        return None, {}
    path = folder / place.file
    fd = open_input(path, root=folder)
    try:
        container = read_member(fd, path, start=place.offset, length=place.length)
        return _arguments(container.pickle, path, folder), {str(path.absolute()): Identity.of(os.fstat(fd))}
    finally:
        os.close(fd)


def _arguments(pickle: PickleValue, path: Path, folder: Path) -> dict[str, Value] | None:
    expect_inert(pickle, path)
    value = pickle.value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return None
    expect_own_name(folder, value.get("iteration"), show(path.name))
    return plain_fields(value.get("args"))


def expect_inert(pickle: PickleValue, path: Path) -> None:
    """Classes of a trainer are data here, whatever they are called; names that run code are refused.

    Raises:
        Refused: there are such (`pickle-names`).
    """
    check_names(pickle.names - _HARMLESS, where=str(path), allow=ANY)


def plain_fields(value: Any) -> dict[str, Value] | None:
    """Fields of a namespace, a dataclass or a dictionary that are numbers or words; a dtype by its name."""
    state = value.state if isinstance(value, Built) else value
    if isinstance(value, Built) and not isinstance(state, dict):
        state = value.kwargs
    if not isinstance(state, Mapping):
        return None
    found: dict[str, Value] = {}
    for key, item in state.items():
        if isinstance(key, str) and isinstance(item, str | int | float | bool | None):
            found[key] = item
        elif isinstance(key, str) and isinstance(item, Global) and item.module == "torch":
            found[key] = item.name
    return found
