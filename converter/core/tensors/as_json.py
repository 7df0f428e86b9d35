"""Lazy tensors as JSON, and back through the normalising constructors.

A node that appears twice is written twice: plans of real models hold few shared nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

from converter.core.tensors import kernel_specs
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import (
    Apply,
    Cast,
    Concat,
    Filled,
    LazyTensor,
    Narrow,
    Reshape,
    Stored,
    Strided,
    apply,
    cast,
    concat,
    narrow,
    reshape,
    stored,
    strided,
)
from converter.errors import Refused
from converter.text import show


def info_to_json(info: TensorInfo) -> dict[str, Any]:
    """`{"dtype": "BF16", "shape": [2, 3]}`, as in a safetensors header."""
    return {"dtype": info.dtype.value, "shape": list(info.shape)}


def info_from_json(obj: Mapping[str, Any]) -> TensorInfo:
    """The inverse of `info_to_json`."""
    return TensorInfo(DType(obj["dtype"]), tuple(int(n) for n in obj["shape"]))


def to_json(x: LazyTensor) -> dict[str, Any]:
    """A node and all below it, as JSON values."""
    match x:
        case Stored():
            return {"node": "stored", **info_to_json(x.info), "file": x.file, "offset": x.offset}
        case Strided():
            where = {"file": x.file, "offset": x.offset, "strides": list(x.strides)}
            return {"node": "strided", **info_to_json(x.info), **where}
        case Narrow():
            cut = {"dim": x.dim, "start": x.start, "length": x.length}
            return {"node": "narrow", "source": to_json(x.source), **cut}
        case Reshape():
            return {"node": "reshape", "source": to_json(x.source), "shape": list(x.shape)}
        case Concat():
            return {"node": "concat", "parts": [to_json(p) for p in x.parts], "dim": x.dim}
        case Cast():
            return {"node": "cast", "source": to_json(x.source), "dtype": x.dtype.value}
        case Filled():
            return {"node": "filled", **info_to_json(x.info), "value": x.value}
        case Apply():
            params = {k: list(v) if isinstance(v, tuple) else v for k, v in x.params}
            return {"node": "apply", "kernel": x.kernel, "inputs": [to_json(i) for i in x.inputs], "params": params}
        case _:
            assert_never(x)


def from_json(obj: Mapping[str, Any]) -> LazyTensor:
    """The tensor that `to_json` wrote.

    Raises:
        Refused: an unknown node, or one whose parts do not fit (`plan-json`).
    """
    try:
        match obj["node"]:
            case "stored":
                return stored(info_from_json(obj), obj["file"], obj["offset"])
            case "strided":
                return strided(info_from_json(obj), obj["file"], obj["offset"], tuple(obj["strides"]))
            case "narrow":
                return narrow(from_json(obj["source"]), obj["dim"], obj["start"], obj["length"])
            case "reshape":
                return reshape(from_json(obj["source"]), tuple(obj["shape"]))
            case "concat":
                return concat([from_json(p) for p in obj["parts"]], obj["dim"])
            case "cast":
                return cast(from_json(obj["source"]), DType(obj["dtype"]))
            case "filled":
                return Filled(info_from_json(obj), obj["value"])
            case "apply":
                params = {k: tuple(v) if isinstance(v, list) else v for k, v in obj["params"].items()}
                return apply(kernel_specs.find(obj["kernel"]), [from_json(i) for i in obj["inputs"]], params)
            case other:
                raise Refused("plan-json", f"`{show(other)}` is not a kind of lazy tensor")
    except (KeyError, TypeError, ValueError) as error:
        raise Refused("plan-json", f"a lazy tensor in the plan is malformed: {show(error)}") from error
