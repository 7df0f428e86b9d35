"""A torch file of a plan that holds more than tensors by name: a tree, with its storages copied or made anew."""

from __future__ import annotations

from typing import Any

from converter.core.formats import torch_zip_writer as torch_zip
from converter.core.formats.pickle_values import Built, Persistent
from converter.core.formats.pickle_writer import MAX_DEPTH, write_pickle
from converter.core.formats.torch_container import Container
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.core.writer.shard_plan import Entry, ShardPlan, chunk_rows
from converter.errors import Refused
from converter.text import show

_PLAIN = 5
"""What a storage's identity has: the word `storage`, its class, key, device and length."""


def lay_out_tree(file: str, tree: Any, source: Container | None = None) -> ShardPlan:
    """A file with what `tree` says; a storage is a lazy tensor, or the key of one of `source`, copied whole.

    Raises:
        Refused: a storage is referred to that `source` doesn't have, or there is none at all (`torch-tensor`).
    """
    storages = _Storages(source)
    pickled = write_pickle(tree, reference=storages.reference)
    if not storages.tensors:
        raise Refused("torch-tensor", "the file holds no tensor", where=show(file))
    named = [(f"data/{i}", t) for i, t in enumerate(storages.tensors)]
    archive = torch_zip.archive(file, [(n, t.info) for n, t in named], pickled)
    placed = [
        Entry(n, t, r.offset, chunk_rows(t), is_storage=True) for (n, t), r in zip(named, archive.tensors, strict=True)
    ]
    return ShardPlan(file, archive.head, tuple(placed), b"", archive.size, pickled=pickled)


def lay_out_any(file: str, tree: Any, source: Container) -> ShardPlan | bytes:
    """A file with what `tree` says; its whole content where there is no tensor in it.

    Raises:
        Refused: see `lay_out_tree`.
    """
    if has_storage(tree):
        return lay_out_tree(file, tree, source)
    return torch_zip.tensorless(write_pickle(tree, reference=lambda identity: identity))


def has_storage(tree: Any, depth: int = 0) -> bool:
    """True where a tree refers to any storage."""
    match tree:
        case Persistent():
            return True
        case Built():
            within: tuple[Any, ...] = (*tree.args, tree.state, *tree.items)
        case dict():
            within = (*tree.values(), getattr(tree, "state", None))
        case list() | tuple():
            within = tuple(tree)
        case _:
            return False
    return depth < MAX_DEPTH and any(has_storage(each, depth + 1) for each in within)


class _Storages:
    """Storages in the order in which they are first referred to, which is that of their numbers."""

    def __init__(self, source: Container | None) -> None:
        self._source = source
        self._where = "" if source is None else show(source.path)
        self._numbers: dict[str, str] = {}
        self.tensors: list[LazyTensor] = []

    def reference(self, identity: Any) -> Any:
        """The identity of a storage in the new file."""
        if not isinstance(identity, tuple) or len(identity) < _PLAIN or identity[0] != "storage":
            raise Refused("torch-tensor", "a storage is referred to in an unknown way", where=self._where)
        key = identity[2]
        if not isinstance(key, str):
            return (*identity[:2], self._add(key), *identity[3:])
        if key not in self._numbers:
            self._numbers[key] = self._add(self._stored(key))
        number = self._numbers[key]
        if len(identity) > _PLAIN:
            # Files that are no archives say here of which storage another is a part; nobody writes such parts.
            if identity[_PLAIN:] != (None,):
                raise Refused("torch-tensor", "a storage is a part of another", where=self._where)
            return (*identity[:2], number, *identity[3:_PLAIN])
        return identity if number == key else (*identity[:2], number, *identity[3:])

    def _add(self, made: LazyTensor) -> str:
        self.tensors.append(made)
        return str(len(self.tensors) - 1)

    def _stored(self, key: str) -> LazyTensor:
        record = None if self._source is None else self._source.storages.get(key)
        if self._source is None or record is None:
            text = f"the storage {show(key)} is referred to, and the file has nothing of it"
            raise Refused("torch-tensor", text, where=self._where)
        return tensors.stored(TensorInfo(DType.U8, (record.length,)), str(self._source.path.absolute()), record.offset)
