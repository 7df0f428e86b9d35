"""Lazy tensors to torch tensors: the only place, with `converter.core.compute.kernels`, where values are computed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, assert_never

from converter.core.compute.device import Device, device_named, repeatable, suits
from converter.core.compute.measures import Measures
from converter.core.files.reading import InputFiles
from converter.core.tensors import kernel_specs
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Apply, Cast, Concat, Filled, LazyTensor, Narrow, Reshape, Stored, Strided
from converter.errors import Refused
from converter.text import show

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Let torch compute on one thread; results then do not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def on_device(name: str | None) -> Iterator[None]:
    """The same, for a plan that computes on the device of this name."""
    with on_one_thread(), contextlib.nullcontext() if name is None else repeatable():
        yield


IMPORT_SWITCH_SECONDS = 0.0005
"""How long a thread that imports keeps the interpreter from one that copies: for each block that asks three times, and
Python's own 5 ms would leave copies 15 MB/s."""


@contextlib.contextmanager
def importing_on_one_thread(device: str | None = None) -> Iterator[Callable[[], object]]:
    """The same, with torch imported in a thread of its own; yields what waits for it, and raises what it raised."""
    if "torch" in sys.modules:
        with on_device(device):
            yield lambda: None
        return
    before = sys.getswitchinterval()
    sys.setswitchinterval(IMPORT_SWITCH_SECONDS)
    with contextlib.ExitStack() as entered, ThreadPoolExecutor(1, thread_name_prefix="torch") as pool:
        begun = pool.submit(lambda: entered.enter_context(on_device(device)))
        begun.add_done_callback(lambda _: sys.setswitchinterval(before))
        yield begun.result


@cache
def torch_dtype(dtype: DType) -> torch.dtype:
    """The dtype of torch of the same name.

    Raises:
        Refused: torch can't compute with it (`dtype-not-computable`); such tensors can be copied all the same.
    """
    import torch

    found = getattr(torch, dtype.torch_name, None)
    if dtype.bits % 8 or not isinstance(found, torch.dtype):
        raise Refused("dtype-not-computable", f"tensors of type {dtype.value} can be copied, but not computed with")
    return found


@cache
def _body(reference: str) -> Callable[[list[Any], Mapping[str, Any]], Any]:
    module, _, name = reference.partition(":")
    body: Callable[[list[Any], Mapping[str, Any]], Any] = getattr(importlib.import_module(module), name)
    return body


@dataclass
class Evaluator:
    """Computes lazy tensors of one entry.

    Attributes:
        files: where stored bytes are read.
        shared: values of nodes that every chunk of the entry needs whole; filled when first met.
        keep: the nodes that belong in `shared`.
        device: where it is computed; None: on the CPU, as numpy and files have it.
    """

    files: InputFiles
    keep: frozenset[LazyTensor] = frozenset()
    shared: dict[LazyTensor, Any] = field(default_factory=dict)
    device: Device | None = None

    def evaluate(self, x: LazyTensor, measures: Measures) -> torch.Tensor:
        """A contiguous CPU tensor of `x.info`; what its outermost kernel measured is added to `measures`, and
        non-finite values that a cast made.
        """
        if self.device is None:
            return self._value(x, measures)
        with self.device.computing():
            return self.device.here(self._value(x, measures))

    def share(self) -> None:
        """Compute what belongs in `shared`, for all threads."""
        with contextlib.nullcontext() if self.device is None else self.device.computing():
            for node in self.keep:
                self._value(node, {})

    def _value(self, x: LazyTensor, measures: Measures) -> torch.Tensor:
        """The value where it is computed."""
        if x not in self.keep:
            return self._compute(x, measures)
        if x not in self.shared:
            found = self._compute(x, measures)
            if self.device is not None:
                self.device.settle()
            self.shared[x] = found
        value: torch.Tensor = self.shared[x]
        return value

    def _compute(self, x: LazyTensor, measures: Measures) -> torch.Tensor:
        import torch

        match x:
            case Stored():
                return self._read(x.info, x.file, x.offset)
            case Strided():
                last = sum((n - 1) * s for n, s in zip(x.info.shape, x.strides, strict=True))
                flat = self._read(TensorInfo(x.info.dtype, (last + 1,)), x.file, x.offset)
                return flat.as_strided(x.info.shape, x.strides).contiguous()
            case Narrow():
                return self._value(x.source, measures).narrow(x.dim, x.start, x.length).contiguous()
            case Reshape():
                return self._value(x.source, measures).reshape(x.shape)
            case Concat():
                return torch.cat([self._value(p, measures) for p in x.parts], dim=x.dim)
            case Cast():
                return _cast(self._value(x.source, measures), x.dtype, measures)
            case Filled():
                return torch.full(x.info.shape, x.value, dtype=torch_dtype(x.info.dtype))
            case Apply():
                inner: Measures = {}
                inputs = [self._value(i, inner) for i in x.inputs]
                spec = kernel_specs.find(x.kernel)
                # A thread takes over how many threads it may use when it is first asked; until then MKL uses all cores,
                # and a product of 10 rows has other last bits (measured: torch 2.13, [10, 4] @ [4, 147]).
                torch.get_num_threads()
                result = _body(spec.body)(inputs, dict(x.params))
                tensor, own = result if isinstance(result, tuple) else (result, {})
                for key, value in own.items():
                    measures[key] = measures.get(key, 0.0) + value
                computed: torch.Tensor = tensor.contiguous()
                _expect(computed, x)
                return computed
            case _:
                assert_never(x)

    def _read(self, info: TensorInfo, file: str, offset: int) -> torch.Tensor:
        import torch

        dtype = torch_dtype(info.dtype)
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        there = self.device
        buffer = torch.empty(info.nbytes, dtype=torch.uint8) if there is None else there.buffer(info.nbytes)
        self.files.read_into(file, offset, as_bytes(buffer))
        value = buffer.view(dtype).reshape(info.shape)
        return value if there is None else there.there(value)


def as_bytes(value: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, element by element as it is stored."""
    import torch

    buffer: Any = value.reshape(-1).view(torch.uint8).numpy()
    return memoryview(buffer)


def _expect(value: torch.Tensor, x: Apply) -> None:
    if tuple(value.shape) != x.info.shape or value.dtype is not torch_dtype(x.info.dtype):
        raise RuntimeError(f"kernel {show(x.kernel)} gave {value.dtype} {list(value.shape)}, declared {x.info}")


def _cast(value: torch.Tensor, dtype: DType, measures: Measures) -> torch.Tensor:
    """Round to `dtype`, counting values that were finite and no longer are."""
    out = _rounded(value, torch_dtype(dtype))
    if value.is_floating_point() and out.is_floating_point() and not _is_finite(out):
        broken = _finite(value) - _finite(out)
        if broken:
            measures["nonfinite_new"] = measures.get("nonfinite_new", 0.0) + broken
    return out


def _rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value.to(dtype)`; torch's own way from bf16 to fp16 takes 1.7 times as long as this one, with the same bits."""
    import torch

    if value.dtype is torch.bfloat16 and dtype is torch.float16:
        value = value.float()
    return value.to(dtype)


def _is_finite(value: torch.Tensor) -> bool:
    """Whether all are finite, as their least and greatest say; False where those can't be had.

    A fortieth of what `isfinite` and a sum take (measured: 0.09 ms for half a million of fp16, against 3.4 ms).
    """
    import torch

    if value.element_size() == 1 or not value.numel():
        return False
    return all(bool(torch.isfinite(end)) for end in value.aminmax())


def _finite(value: torch.Tensor) -> int:
    import torch

    wide = value.float() if value.element_size() == 1 else value
    return int(torch.isfinite(wide).sum())


def evaluator(tensor: LazyTensor, files: InputFiles, device: str | None, *, shares: bool = True) -> Evaluator:
    """What computes an entry of a plan; on the CPU where one of its kernels runs nowhere else.

    Args:
        device: where the plan computes; None: on the CPU.
        shares: what several chunks need is kept.
    """
    keep = shared_nodes(tensor) if shares else frozenset()
    return Evaluator(files, keep, device=device_named(device) if device is not None and suits(tensor) else None)


def shared_nodes(tensor: LazyTensor) -> frozenset[LazyTensor]:
    """What chunks need whole or by columns of an entry's kernels: read and computed once.

    These are their inputs; of a tensor that is made of several, what their inputs are columns of.
    """
    while isinstance(tensor, Cast | Reshape | Narrow):
        tensor = tensor.source
    if isinstance(tensor, Concat):
        return frozenset(cut for part in tensor.parts for node in shared_nodes(part) if (cut := _cut_columns(node)))
    if not isinstance(tensor, Apply) or not tensor.info.shape or tensor.info.shape[0] < 2:
        return frozenset()
    infos = tuple(i.info for i in tensor.inputs)
    needs = kernel_specs.find(tensor.kernel).needs(0, 1, infos, dict(tensor.params))
    if needs is None:
        return frozenset()
    found: set[LazyTensor] = set()
    for each, need in zip(tensor.inputs, needs, strict=True):
        if need is None or need.dim != 0:
            found.add(each)
        else:
            found |= shared_nodes(each)
    return frozenset(found)


def _cut_columns(node: LazyTensor) -> LazyTensor | None:
    """What the node is a slice of in an inner dimension: reading the slice reads all of that."""
    while isinstance(node, Cast | Reshape):
        node = node.source
    return node.source if isinstance(node, Narrow) else None


def to_torch(tensor: LazyTensor) -> torch.Tensor:
    """The values of one lazy tensor, whole and in memory: for small ones, and for those who use this as a library."""
    with InputFiles({}) as files:
        return Evaluator(files).evaluate(tensor, {})


def to_bytes(tensor: LazyTensor) -> bytes:
    """The bytes of one lazy tensor, computed on one thread, so that every machine gives the same."""
    with on_one_thread():
        return bytes(as_bytes(to_torch(tensor)))
