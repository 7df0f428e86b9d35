"""What accelerate saves under FSDP, as nests of dictionaries: a model's state, an optimizer's, in one of three layouts.

A nest has lazy tensors where tensors were; all else is what the pickles say. Sharded (a distributed checkpoint) and
full (one file of torch.save) hold the same nest, so that one is written from the other.

Source: `save_fsdp_model`, `save_fsdp_optimizer`,
https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py, and `flatten_state_dict` in
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/_nested_dict.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import Identity
from converter.core.formats.torch_file import read_torch_file
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.sources.dcp.chunks import Pieces
from converter.sources.dcp.metadata import Metadata
from converter.sources.dcp.weights import readable_metadata
from converter.text import show

MODEL, OPTIMIZER = "model", "optimizer"
"""The one key that accelerate puts a state under in a distributed checkpoint."""
STATE, GROUPS = "state", "param_groups"
_PLAIN = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True)
class Nest:
    """A state, and what must hold of the files that it lies in.

    Attributes:
        value: dictionaries and lists with lazy tensors in them.
    """

    value: dict[str, Any]
    inputs: Mapping[str, Identity]
    checks: tuple[RecordCheck, ...]
    digest: str


def read_full(path: Path) -> Nest:
    """The nest in one file of torch.save.

    Raises:
        Refused: not such a file, or with something in it that is neither a tensor nor plain (`fsdp-state`).
    """
    read = read_torch_file(path, root=path.parent)
    if not isinstance(read.value, dict):
        raise _refuse(path, "the file holds no dictionary")
    _expect_plain(read.value, path, "")
    return Nest(read.value, {str(path.absolute()): read.identity}, read.checks, read.digest)


def read_sharded(folder: Path, top: str) -> Nest:
    """The nest in a distributed checkpoint, below the key that accelerate puts it under.

    Raises:
        Refused: files missing, cut short or malformed; another layout than accelerate's (`fsdp-state`).
    """
    metadata = readable_metadata(folder)
    pieces = Pieces(metadata)
    paths = {k: _path(metadata, k, top) for k in (*metadata.tensors, *metadata.blobs)}
    found: dict[str, Any] = {}
    held: dict[str, Any] = dict(pieces.read(metadata.tensors))
    held |= pieces.objects(metadata.blobs)
    for key, path in paths.items():
        _expect_plain(held[key], folder, key)
        _put(found, path, held[key], metadata)
    if isinstance(found.get(GROUPS), dict):
        found[GROUPS] = _as_list(found[GROUPS], metadata)
    return Nest(found, pieces.inputs, tuple(pieces.checks), pieces.digest)


def _path(metadata: Metadata, key: str, top: str) -> tuple[str, ...]:
    """Keys that lead to an entry, below `top`; of older saves, which keep no paths, as the key itself says."""
    path = metadata.path(key)
    if len(path) == 1:
        first, _, rest = key.partition(".")
        path = (first, *_parts(rest, top))
    if path[0] != top or len(path) < 2:
        raise metadata.refuse("fsdp-state", f"{show(key)} is not below `{top}`, where accelerate saves its state")
    return path[1:]


def _parts(rest: str, top: str) -> tuple[str, ...]:
    if top == MODEL:
        return (rest,)
    if (group := re.fullmatch(rf"({GROUPS})\.(\d+)\.(\w+)", rest, re.ASCII)) is not None:
        return group.groups()
    start, _, name = rest.partition(".")
    name, _, leaf = name.rpartition(".")
    return (start, name, leaf) if name else (rest,)


def _put(nest: dict[str, Any], path: tuple[str, ...], value: Any, metadata: Metadata) -> None:
    for word in path[:-1]:
        nest = nest.setdefault(word, {})
        if not isinstance(nest, dict):
            raise metadata.refuse("fsdp-state", f"{show(word)} is both a value and a dictionary")
    nest[path[-1]] = value


def _as_list(groups: Mapping[str, Any], metadata: Metadata) -> list[Any]:
    """Groups of parameters, which are numbered in the keys."""
    if set(groups) != {str(n) for n in range(len(groups))}:
        raise metadata.refuse("fsdp-state", "the groups of parameters are not numbered from 0")
    return [groups[str(n)] for n in range(len(groups))]


def _expect_plain(value: Any, where: Path, at: str) -> None:
    """What both layouts hold: tensors, numbers, texts, and containers of them."""
    if isinstance(value, (LazyTensor, *_PLAIN)):
        return
    if isinstance(value, dict) and all(isinstance(k, str | int) for k in value):
        for key, inner in value.items():
            _expect_plain(inner, where, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            _expect_plain(inner, where, at)
    else:
        raise _refuse(where, f"{show(at)} holds something else than tensors, numbers and texts")


def expect_optimizer(nest: Nest, where: Path) -> None:
    """An optimizer's state by names of parameters, with its groups, whose parameters have their states here.

    Raises:
        Refused: something else (`fsdp-state`).
    """
    states, groups = nest.value.get(STATE), nest.value.get(GROUPS)
    if not isinstance(states, dict) or not all(isinstance(s, dict) for s in states.values()):
        raise _refuse(where, "there is no state by parameters")
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise _refuse(where, "there are no groups of parameters")
    if numbered := [n for n in states if not isinstance(n, str)]:
        what = f"parameters are numbered ({len(numbered)} of them) and not named, and the other layout has names"
        raise _refuse(where, what)
    named = {n for g in groups for n in g["params"] if isinstance(n, str)}
    if strangers := [n for n in states if n not in named]:
        raise _refuse(where, f"{show(strangers[0])} has a state and is in no group of parameters")


def leaves(nest: Mapping[str, Any], under: str) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    """Entries as torch's planner flattens them: key, path, and a tensor or what is saved as an object.

    Dictionaries are entered, and of lists those that hold dictionaries.
    """
    yield from _leaves(nest, (under,))


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    if isinstance(value, dict) and (value or len(path) == 1):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(i, dict) for i in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, number))
    else:
        yield ".".join(map(str, path)), path, value


def _refuse(where: Path, what: str) -> Refused:
    return Refused(
        "fsdp-state",
        f"this state is not as accelerate saves it under FSDP: {what}",
        where=show(where),
        next="resume from it as it is, with the fsdp_state_dict_type that it was saved with",
    )
