"""Where kernels compute: this process's CPU, or the CUDA device that a user asked for.

A device is given the operands of a chunk, computes them in the same dtypes and the same order as the CPU, and gives the
result back. Its matrix products add in an order of their own, so a merge's last bits in fp32 may be others than the
CPU's; on one kind of device they are the same in every run.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from converter.core.tensors import kernel_specs
from converter.core.tensors.nodes import Apply, Cast, Concat, LazyTensor, Narrow, Reshape
from converter.errors import Refused, UsageError
from converter.text import show

if TYPE_CHECKING:
    import torch

_ASKED = re.compile(r"auto|cpu|cuda(?::\d{1,4})?")
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""What cuBLAS needs to give the same bits on several streams.

Source: https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"""


class Device:
    """A device, and how values come to it and back.

    Each thread has a stream of its own there, so that copies of one run beside kernels of another. What is copied lies
    in pinned memory, which a CUDA device reads and writes by itself.
    """

    def __init__(self, where: torch.device) -> None:
        import torch

        self._where = where
        self._module: Any = torch.get_device_module(where)
        self._is_apart = where.type != "cpu"
        self._own = threading.local()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """What this thread makes while it is entered is made there, in this thread's stream."""
        if not hasattr(self._own, "stream"):
            self._own.stream = self._module.Stream(self._where)
        with _memory_refused(), self._module.stream(self._own.stream), self._where:
            yield

    def buffer(self, count: int) -> torch.Tensor:
        """Bytes here, from which the device can copy."""
        import torch

        return torch.empty(count, dtype=torch.uint8, device="cpu", pin_memory=self._is_apart)

    def there(self, value: torch.Tensor) -> torch.Tensor:
        """The value on the device; it is there for what this thread computes next."""
        return value.to(self._where, non_blocking=True)

    def here(self, value: torch.Tensor) -> torch.Tensor:
        """The value in memory of this process, once it has come."""
        import torch

        found = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=self._is_apart)
        found.copy_(value, non_blocking=True)
        self.settle()
        return found

    def settle(self) -> None:
        """Wait for what this thread asked of the device, after which other threads may use it."""
        done = self._module.Event()
        done.record()
        done.synchronize()


@cache
def device_named(name: str) -> Device:
    """The device that a plan names, as `cuda:0`."""
    import torch

    return Device(torch.device(name))


def chosen(asked: str) -> str | None:
    """The device that is meant by what a user asked for; None is the CPU, also where no CUDA device is there.

    Raises:
        UsageError: no such word, or a number that no device has (`usage`).
    """
    if not _ASKED.fullmatch(asked):
        raise UsageError("usage", f"no device is named {show(asked)}", expected="auto, cpu, cuda or cuda:N")
    if asked == "cpu":
        return None
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(asked.partition(":")[2] or 0)
    if count and number >= count:
        what = f"there is no CUDA device {number}: {count} are here, counted from 0"
        raise UsageError("usage", what, expected=f"--device cuda:{count - 1} or less")
    name = f"cuda:{number}"
    return name if count and _answers(name) else None


def _answers(name: str) -> bool:
    """Whether this torch runs a kernel there: it may be built for other devices, or another process may hold this."""
    import torch

    try:
        return float(torch.ones(1, device=name) + 1) == 2
    except RuntimeError:
        return False


def model_of(name: str) -> str:
    """What kind of device it is, as its maker calls it: the bits of a merge depend on that."""
    import torch

    return str(torch.cuda.get_device_name(torch.device(name)))


def suits(x: LazyTensor) -> bool:
    """True for what is computed by casts and by kernels that any device runs: see `KernelSpec.on_device`."""
    return _computes(x) and _runs(x)


def _computes(x: LazyTensor) -> bool:
    return isinstance(x, Apply | Cast) or any(map(_computes, _sources(x)))


def _runs(x: LazyTensor) -> bool:
    if isinstance(x, Apply) and not kernel_specs.find(x.kernel).on_device:
        return False
    return all(map(_runs, _sources(x)))


def _sources(x: LazyTensor) -> tuple[LazyTensor, ...]:
    match x:
        case Apply():
            return x.inputs
        case Concat():
            return x.parts
        case Cast() | Narrow() | Reshape():
            return (x.source,)
        case _:
            return ()


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Let torch give the same bits in every run on a device: its deterministic algorithms, and no TF32."""
    import torch

    filling: Any = torch.utils.deterministic

    name, value = _WORKSPACE
    given = os.environ.get(name)
    before = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(), filling.fill_uninitialized_memory,
    )  # fmt: skip
    os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.set_float32_matmul_precision(before[2])
        filling.fill_uninitialized_memory = before[3]
        if given is None:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _memory_refused() -> Iterator[None]:
    """A device without room in a user's words (`no-memory`)."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        what = "the device has no room for the chunks that are computed at once"
        raise Refused("no-memory", what, got=show(str(error).partition("\n")[0]), next=_LESS) from error


_LESS = "the same command with fewer --jobs, or with --device cpu and --no-resume"
