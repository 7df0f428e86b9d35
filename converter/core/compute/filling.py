"""Values into the tensors of a live torch model, a chunk at a time: nothing of a checkpoint is held beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.core.compute.evaluate import Evaluator, as_bytes, on_one_thread, shared_nodes, torch_dtype
from converter.core.compute.measures import Measures
from converter.core.files.reading import InputFiles
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor, Stored, rows
from converter.errors import UsageError, VerificationFailed
from converter.text import show

if TYPE_CHECKING:
    import torch

    Module = torch.nn.Module
    Tensor = torch.Tensor


@dataclass(frozen=True)
class Live:
    """A parameter or a persistent buffer of a model in memory.

    Attributes:
        names: every name that the model has for it; several where it is tied.
        dtype: None for a type that no checkpoint has.
        fault: why it can't be filled; empty where it can.
    """

    names: tuple[str, ...]
    tensor: Tensor
    shape: tuple[int, ...]
    dtype: DType | None
    fault: str = ""


@dataclass(frozen=True)
class Filling:
    """One stored tensor and where it goes: a whole live tensor, or a stretch of one that transformers stacks.

    Attributes:
        start: the first element of the live tensor, counted row-major.
        chunks: row ranges in which the value is computed, those in which a conversion computes it.
    """

    name: str
    value: LazyTensor
    live: Live
    start: int
    chunks: Sequence[tuple[int, int]]


def live_tensors(model: Module) -> list[Live]:
    """The parameters and persistent buffers of a model, each once, under all its names.

    Raises:
        UsageError: this is not a torch module (`usage`).
    """
    state = getattr(model, "state_dict", None)
    if state is None:
        raise UsageError("usage", f"a live torch model is filled, and this is a {type(model).__name__}")
    names: dict[int, list[str]] = {}
    tensors: dict[int, Any] = {}
    for name, tensor in state(keep_vars=True).items():
        if hasattr(tensor, "data_ptr"):  # not the extra state of a module
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    return [_live(tuple(found), tensors[key]) for key, found in names.items()]


def live_buffers(model: Module, names: Sequence[str]) -> dict[str, Live]:
    """The model's own buffers of these names that are not saved with it."""
    saved = model.state_dict(keep_vars=True)
    own = dict(model.named_buffers(recurse=False))
    return {n: _live((n,), own[n]) for n in names if n in own and n not in saved}


def _live(names: tuple[str, ...], tensor: Any) -> Live:
    try:
        dtype: DType | None = DType.parse(str(tensor.dtype))
    except UsageError:
        dtype = None
    fault = ""
    if tensor.is_meta:
        fault = "is on the meta device and has no memory"
    elif hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id"):
        fault = "is one rank's part of a tensor"
    elif not tensor.is_contiguous():
        fault = "is a view that is not contiguous"
    return Live(names, tensor, tuple(tensor.shape), dtype, fault)


def fill(
    fillings: Sequence[Filling],
    files: InputFiles,
    *,
    jobs: int = 1,
    told: Callable[[int, str], None] = lambda count, name: None,
) -> dict[str, Measures]:
    """Compute each value and copy it into its live tensor, whose dtype and device it takes; what kernels measured.

    Raises:
        VerificationFailed: a finite value is no longer finite in the live tensor's dtype (`new-nonfinite`).
    """
    measured: dict[str, Measures] = {}
    with on_one_thread(), ThreadPoolExecutor(max_workers=max(jobs, 1), thread_name_prefix="filling") as pool:
        for filling in fillings:
            measures = _fill(filling, files, pool, told)
            if measures:
                measured[filling.name] = measures
    return measured


def _fill(filling: Filling, files: InputFiles, pool: ThreadPoolExecutor, told: Callable[[int, str], None]) -> Measures:
    evaluator = Evaluator(files, shared_nodes(filling.value))
    total: Measures = {}
    chunks = list(filling.chunks)
    if evaluator.keep and chunks:
        # What every chunk needs whole is computed once, before others could begin to as well.
        parts = [_fill_rows(filling, evaluator, *chunks[0]), *_in_turn(filling, evaluator, pool, chunks[1:])]
    else:
        parts = _in_turn(filling, evaluator, pool, chunks)
    for part in parts:
        for key, number in part.items():
            total[key] = total.get(key, 0.0) + number
    if broken := int(total.get("nonfinite_new", 0)):
        raise VerificationFailed(
            "new-nonfinite",
            f"{broken} values of {show(filling.name)} overflowed, and the inputs are finite there; the model is partly "
            "filled",
            next="fill a model of a wider dtype, or give dtype='float32'",
        )
    told(filling.value.info.nbytes, filling.name)
    return total


def _in_turn(
    filling: Filling, evaluator: Evaluator, pool: ThreadPoolExecutor, chunks: Sequence[tuple[int, int]]
) -> list[Measures]:
    return list(pool.map(lambda chunk: _fill_rows(filling, evaluator, *chunk), chunks))


def _fill_rows(filling: Filling, evaluator: Evaluator, start: int, stop: int) -> Measures:
    """Compute rows and copy them to their place."""
    import torch

    shape = filling.value.info.shape
    piece = filling.value if not shape or stop - start == shape[0] else rows(filling.value, start, stop)
    width = math.prod(shape[1:])
    measures: Measures = {}
    place = filling.live.tensor.detach().view(-1).narrow(0, filling.start + start * width, piece.info.numel)
    if isinstance(piece, Stored) and place.device.type == "cpu" and place.dtype is torch_dtype(piece.info.dtype):
        evaluator.files.read_into(piece.file, piece.offset, as_bytes(place))
        return measures
    with torch.no_grad():
        value = evaluator.evaluate(piece, measures).reshape(-1)
        place.copy_(value)
        if value.is_floating_point() and place.dtype is not value.dtype:
            broken = int(torch.isfinite(value.float()).sum()) - int(torch.isfinite(place.float()).sum())
            if broken:
                measures["nonfinite_new"] = measures.get("nonfinite_new", 0.0) + broken
    return measures
