"""Files of torch.save as lazy tensors: nothing is unpickled, no torch is needed, only the directory is read.

`read_torch_file` gives the saved value with every tensor as a lazy tensor over byte ranges of the file. Views become
Stored or Strided; a tensor is checked against its storage and the storage against its record before it is returned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.checkpoint import RecordCheck
from converter.core.files import sparse
from converter.core.files.opening import Identity
from converter.core.formats.pickle_machine import check_names
from converter.core.formats.pickle_values import Built, Global, Persistent
from converter.core.formats.torch_container import (
    Container,
    Record,
    item_bytes,
    read_container,
    read_member,
    storage_type,
)
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import show

MAX_DEPTH = 64
MAX_ELEMENTS = 2**62

_DTYPES = {d.torch_name: d for d in DType} | {"half": DType.F16, "float": DType.F32, "double": DType.F64}
_STORAGE_DTYPES = {
    "Float": DType.F32, "Double": DType.F64, "Half": DType.F16, "BFloat16": DType.BF16, "Long": DType.I64,
    "Int": DType.I32, "Short": DType.I16, "Char": DType.I8, "Byte": DType.U8, "Bool": DType.BOOL,
    "ComplexFloat": DType.C64,
}  # fmt: skip


def dtype_named(name: str) -> DType | None:
    """The type that torch calls `bfloat16`; None where safetensors has no name for it."""
    return _DTYPES.get(name)


@dataclass(frozen=True, eq=False)
class Opaque:
    """A saved object that is not a tensor and no plain container: its name, and what it was made from.

    Compared by identity, so that one may be a key whatever it holds.
    """

    path: str
    args: tuple[Any, ...]
    state: Any


@dataclass(frozen=True)
class TorchFile:
    """What torch.save wrote.

    Attributes:
        value: dictionaries, lists, tuples, scalars, `Opaque` objects, and lazy tensors where tensors were.
        checks: CRC-32 of every storage that a tensor uses, where the container has one.
        identity: of the file when it was read.
        digest: sha256 of what its pickles say, hexadecimal, checksums of the storages included.
        name: see `Container`.
    """

    value: Any
    checks: tuple[RecordCheck, ...]
    identity: Identity
    digest: str
    name: str = ""


def read_torch_file(path: Path, *, root: Path | None = None, allow_names: re.Pattern[str] | None = None) -> TorchFile:
    """The value in a `.bin`, `.pt` or `.pth` file, with lazy tensors.

    Args:
        root: the folder that the file must lie in (see `open_input`).
        allow_names: names of the user's own trainer that the file may mention; they are not imported either.

    Raises:
        Refused: not a torch file, cut short, malformed, naming foreign code, or with a tensor that does not fit its
            storage (`torch-tensor`), is quantised or sparse (`torch-tensor-kind`).
    """
    container = sparse.read_again(path, lambda: read_container(path, root=root, is_shared=True))
    return _torch_file(container, allow_names)


def read_numbers(path: Path, *, root: Path) -> TorchFile:
    """Numbers and texts of the dictionary in a file; of what else is in it, tensors too, nothing is looked at.

    Raises:
        Refused: of the container and of the names in it, as `read_torch_file` does.
    """
    container = sparse.read_again(path, lambda: read_container(path, root=root, is_shared=True))
    check_names(container.pickle.names, where=str(path))
    value = container.pickle.value
    items = value.items() if isinstance(value, dict) else ()
    found = {k: v for k, v in items if isinstance(k, str) and isinstance(v, int | float | str)}
    return TorchFile(found, (), container.identity, container.digest, container.name)


def read_tree(path: Path, *, root: Path) -> Container:
    """The same file as what its pickle says, with the places of its storages: for those who write it again.

    Raises:
        Refused: of the container and of the names in it, as `read_torch_file` does.
    """
    container = sparse.read_again(path, lambda: read_container(path, root=root))
    check_names(container.pickle.names, where=str(path))
    return container


def read_torch_member(fd: int, path: Path, *, start: int, length: int) -> TorchFile:
    """The value in a stretch of a file that is a file of torch.save itself; `fd` is the open file.

    Raises:
        Refused: see `read_torch_file`.
    """
    return _torch_file(read_member(fd, path, start=start, length=length), None)


def _torch_file(container: Container, allow_names: re.Pattern[str] | None) -> TorchFile:
    path = container.path
    check_names(container.pickle.names, where=str(path), allow=allow_names)
    resolver = _Resolver(container)
    value = resolver.resolve(container.pickle.value, 0)
    checks = tuple(
        RecordCheck(str(path.absolute()), r.offset, r.length, r.crc)
        for r in resolver.used.values()
        if r.crc is not None
    )
    return TorchFile(value, checks, container.identity, container.digest, container.name)


class _Resolver:
    """Turns what the pickle says into values; every object once, however often it is referred to."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._file = str(container.path.absolute())
        self._done: dict[int, Any] = {}
        self.used: dict[str, Record] = {}

    def resolve(self, item: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self._bad("torch-tensor", f"values are nested deeper than {MAX_DEPTH}")
        if isinstance(item, str | int | float | bytes | None):
            return item
        if id(item) in self._done:
            return self._done[id(item)]
        if isinstance(item, dict):
            found: dict[Any, Any] = {}
            self._done[id(item)] = found
            for key, value in item.items():
                found[self._key(key, depth)] = self.resolve(value, depth + 1)
            return found
        value = self._resolve_one(item, depth)
        self._done[id(item)] = value
        return value

    def _key(self, key: Any, depth: int) -> Any:
        if not isinstance(key, Built):
            return key
        value = self.resolve(key, depth + 1)
        try:
            hash(value)
        except TypeError as error:
            raise self._bad("torch-tensor", "a key of a dictionary is a container") from error
        return value

    def _resolve_one(self, item: Any, depth: int) -> Any:
        match item:
            case list():
                return [self.resolve(i, depth + 1) for i in item]
            case tuple():
                return tuple(self.resolve(i, depth + 1) for i in item)
            case Global():
                return (
                    _DTYPES[item.name]
                    if item.module == "torch" and item.name in _DTYPES
                    else Opaque(item.path, (), None)
                )
            case Built():
                return self._built(item, depth)
            case Persistent():
                return Opaque("torch.storage", (), None)
            case _:
                return Opaque(type(item).__name__, (), None)

    def _built(self, item: Built, depth: int) -> Any:
        name = item.path
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self._tensor(item.args, None)
        if name == "torch._utils._rebuild_tensor_v3":
            return self._tensor(item.args, self._dtype(item.args[6] if len(item.args) > 6 else None))
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state") and item.args:
            return self.resolve(item.args[0], depth + 1)
        if name == "torch._tensor._rebuild_from_type_v2" and len(item.args) >= 3:
            return self._from_type(item, depth)
        if name in ("torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor", "torch.Tensor"):
            raise self._bad(
                "torch-tensor-kind", f"a tensor was saved by {name}: quantised and sparse ones are not read"
            )
        if name == "torch.Size":
            return tuple(self.resolve(i, depth + 1) for i in (item.args[0] if item.args else ()))
        if name == "collections.OrderedDict" or name == "collections.defaultdict":
            return self._mapping(item, depth)
        if name == "_codecs.encode" and item.args and isinstance(item.args[0], str):
            return item.args[0].encode("latin-1", "replace")
        args = tuple(self.resolve(a, depth + 1) for a in item.args)
        return Opaque(name, args, self.resolve(item.state, depth + 1))

    def _from_type(self, item: Built, depth: int) -> Any:
        """Subclasses of Tensor: the function and arguments of the tensor they wrap."""
        function, kind, args = item.args[0], item.args[1], item.args[2]
        if isinstance(args, tuple):
            # Not through `resolve`, which remembers values by identity: this one does not outlive the call.
            value = self._built(Built(function, args), depth + 1)
            if isinstance(value, Opaque) and len(item.args) > 3:
                # A wrapper such as DTensor: its local tensor and its placement are what is set on it.
                return Opaque(value.path, value.args, self.resolve(item.args[3], depth + 1))
            return value
        return Opaque(getattr(kind, "path", ""), (), None)

    def _mapping(self, item: Built, depth: int) -> dict[Any, Any]:
        """A dictionary that was made from pairs, filled afterwards, or both."""
        pairs = item.args[0] if item.args and isinstance(item.args[0], list) else []
        found: dict[Any, Any] = {}
        for pair in [*pairs, *item.items]:
            if (
                not isinstance(pair, list | tuple)
                or len(pair) != 2
                or not isinstance(pair[0], str | int | float | None)
            ):
                raise self._bad("torch-tensor", "a dictionary was saved in a form that is not read")
            found[pair[0]] = self.resolve(pair[1], depth + 1)
        return found

    def _tensor(self, args: tuple[Any, ...], dtype: DType | None) -> LazyTensor:
        if len(args) < 4 or not isinstance(args[0], Persistent):
            raise self._bad("torch-tensor", "a tensor has no storage")
        record, kind = self._storage(args[0])
        offset, shape, strides = args[1], self._counts(args[2]), self._counts(args[3])
        element = dtype or _STORAGE_DTYPES.get(kind)
        if element is None:
            raise self._bad("torch-tensor-kind", f"a tensor of type {show(kind)} is not read")
        if type(offset) is not int or offset < 0 or len(shape) != len(strides):
            raise self._bad("torch-tensor", "a tensor has a malformed shape")
        info = TensorInfo(element, shape)
        width = element.bits // 8
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if info.numel else -1
        if info.numel > MAX_ELEMENTS or (offset + last + 1) * width > record.length:
            raise self._bad(
                "torch-tensor", f"a tensor {list(shape)} is larger than its storage of {record.length} bytes"
            )
        if info.numel > record.length // width:
            raise self._bad("torch-tensor", f"a tensor {list(shape)} repeats its storage of {record.length} bytes")
        return tensors.strided(info, self._file, record.offset + offset * width, strides)

    def _storage(self, reference: Persistent) -> tuple[Record, str]:
        """A storage's bytes and type name; its claimed length must be the record's."""
        identity = reference.identity
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise self._bad("torch-tensor", "a storage is referred to in an unknown way")
        kind, key, count = storage_type(identity[1]), str(identity[2]), identity[4]
        record = self._container.storages.get(key)
        if record is None or type(count) is not int or count * item_bytes(kind) != record.length:
            got = "nothing" if record is None else f"{record.length} bytes"
            raise self._bad(
                "torch-tensor", f"the storage {show(key)} claims {show(count)} x {show(kind)}, and the file has {got}"
            )
        self.used[key] = record
        return record, kind

    def _counts(self, value: Any) -> tuple[int, ...]:
        items = value.args[0] if isinstance(value, Built) and value.path == "torch.Size" and value.args else value
        if not isinstance(items, tuple | list) or not all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in items):
            raise self._bad("torch-tensor", "a tensor has a malformed shape")
        return tuple(items)

    def _dtype(self, value: Any) -> DType:
        found = _DTYPES.get(value.name) if isinstance(value, Global) and value.module == "torch" else None
        if found is None:
            raise self._bad("torch-tensor-kind", f"a tensor has the unknown type {show(getattr(value, 'path', value))}")
        return found

    def _bad(self, code: str, what: str) -> Refused:
        return Refused(code, what, where=show(self._container.path))


def state_dict(value: Any) -> Mapping[str, LazyTensor] | None:
    """A saved value as names and tensors, if that is what it is; what `wrapped_in` names is opened."""
    for key in wrapped_in(value):
        value = value[key]
    if not isinstance(value, dict) or not value:
        return None
    if all(isinstance(k, str) and _is_tensor(v) for k, v in value.items()):
        return value
    return None


def wrapped_in(value: Any) -> tuple[str, ...]:
    """Keys that lead from a saved value to its names and tensors, of a script that saved more beside them.

    A key that scripts commonly use, else the only one below which tensors lie by name: where several models are saved
    side by side none is chosen.
    """
    found: list[str] = []
    while isinstance(value, dict) and len(found) < _MOST_WRAPPERS and (key := _inner(value)) is not None:
        value = value[key]
        found.append(key)
    return tuple(found)


_COMMON_KEYS = ("state_dict", "module", "model", "model_state_dict")
_NOT_WEIGHTS = re.compile(r"optim|exp_avg|moment|grad|sched|rng", re.ASCII | re.IGNORECASE)
"""What scripts call that which has the names of a model's weights, or might, and is not them."""
_MOST_WRAPPERS = 8


def _inner(value: Mapping[Any, Any]) -> str | None:
    """The key of the dictionary that holds the tensors of one; None where the tensors are in it itself."""
    if not any(map(_is_tensor, value.values())):
        for key in _COMMON_KEYS:
            if isinstance(value.get(key), dict):
                return key
    elif all(map(_is_tensor, value.values())):
        return None
    named = [k for k, v in value.items() if isinstance(k, str) and not _NOT_WEIGHTS.search(k) and _holds_tensors(v)]
    common = [k for k in named if k in _COMMON_KEYS]
    return common[0] if common else named[0] if len(named) == 1 else None


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    """True for tensors by name, or for a dictionary with such below a common key."""
    if not isinstance(value, dict) or not value or depth == _MOST_WRAPPERS:
        return False
    if all(isinstance(k, str) and _is_tensor(t) for k, t in value.items()):
        return True
    return any(_holds_tensors(value.get(key), depth + 1) for key in _COMMON_KEYS)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, LazyTensor)
