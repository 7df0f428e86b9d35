"""What torch.save says of tensors, as a tree: made anew, or taken from a file and changed in places.

A tensor is a call that rebuilds it from a storage, and the storage is named by a key. In a tree that is going to be
written the key may be anything that whoever writes it knows: the key of a file that was read, or a lazy tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from converter.core.formats.pickle_values import Built, Global, Ordered, Persistent
from converter.core.formats.pickle_writer import write_pickle
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import show

_STORAGES = {
    DType.F32: "Float", DType.F64: "Double", DType.F16: "Half", DType.BF16: "BFloat16", DType.I64: "Long",
    DType.I32: "Int", DType.I16: "Short", DType.I8: "Char", DType.U8: "Byte", DType.BOOL: "Bool",
    DType.C64: "ComplexFloat",
}  # fmt: skip
"""Element types with a storage class of their own."""

_UNTYPED = frozenset(
    (DType.F8_E4M3, DType.F8_E5M2, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ, DType.F8_E8M0, DType.U16, DType.U32, DType.U64)
)
"""Newer ones: bytes in the file, and the type beside the shape."""

_STORAGE, _CPU = "storage", "cpu"
"""One object each: a constant of torch's writer is written once and then referred to."""


def is_writable(dtype: DType) -> bool:
    """True where torch has a type that a file can name."""
    return dtype in _STORAGES or dtype in _UNTYPED


def tensor(info: TensorInfo, key: Any, *, requires_grad: bool = False) -> Built:
    """A contiguous tensor that has the storage `key` to itself.

    Raises:
        Refused: a type that torch doesn't have, or packs differently (`torch-dtype`).
    """
    if not is_writable(info.dtype):
        what = f"torch's files can't hold {show(key)}: torch has no {info.dtype.value} as it is stored here"
        raise Refused("torch-dtype", what, next="write safetensors, or another --dtype")
    kind = _STORAGES.get(info.dtype)
    storage = Global("torch", f"{kind}Storage") if kind else Global("torch.storage", "UntypedStorage")
    identity = (_STORAGE, storage, key, _CPU, info.numel if kind else info.nbytes)
    args = (Persistent(identity), 0, (*info.shape,), _strides(info.shape), requires_grad, Ordered())
    if kind:
        return Built(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Built(Global("torch._utils", "_rebuild_tensor_v3"), (*args, Global("torch", info.dtype.torch_name)))


def changed(tree: Mapping[Any, Any], /, **values: Any) -> Any:
    """A dictionary of a tree with other values, of the same kind and in the same order; new keys come last."""
    made: Any = Ordered(tree) if isinstance(tree, Ordered) else dict(tree)
    if isinstance(tree, Ordered):
        made.state = tree.state
    made.update(values)
    return made


def saved(lazy: LazyTensor, *, requires_grad: bool = False) -> Built:
    """A tensor that is written with its own storage."""
    return tensor(lazy.info, lazy, requires_grad=requires_grad)


def size(shape: Sequence[int]) -> Built:
    """A `torch.Size`."""
    return Built(Global("torch", "Size"), ((*shape,),))


def member(info: TensorInfo) -> bytes:
    """The pickle of one tensor, saved by itself.

    Raises:
        Refused: a type that torch doesn't have, or packs differently (`torch-dtype`).
    """
    return write_pickle(tensor(info, "0"), reference=lambda identity: identity)


def by_name(tensors: Sequence[tuple[str, TensorInfo]]) -> bytes:
    """The pickle of an OrderedDict of tensors, each on a storage named by its number.

    Raises:
        Refused: a type that torch doesn't have, or packs differently (`torch-dtype`).
    """
    tree = Ordered((name, tensor(info, name)) for name, info in tensors)
    numbers = iter(range(len(tensors)))
    return write_pickle(tree, reference=lambda identity: (*identity[:2], str(next(numbers)), *identity[3:]))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index to the next of each dimension, rows after rows; torch counts empty ones as 1."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * max(length, 1))
    return tuple(reversed(strides)) if shape else ()
