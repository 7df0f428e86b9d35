"""Declarations of kernels, without torch: what shape comes out, which slice of each input a range of rows needs.

A kernel is a name in an `Apply` node; its body lives in another module and is imported only when values are computed.
Third parties add one with an entry point in the group `rlhf_convert.kernels`, as ours are; a PEFT method
brings its own (`Method.kernels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from converter.core.tensors.dtypes import DType, TensorInfo
from converter.diagnostic import Command
from converter.errors import Refused
from converter.plugins import KERNELS, METHODS, loaded, named
from converter.text import show

Scalar = bool | int | float | str
Param = Scalar | tuple[Scalar, ...]
Params = Mapping[str, Param]
Infos = tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of an input that is needed: `length` indices of dimension `dim` from `start`."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class KernelSpec:
    """What the planner must know of a kernel.

    Attributes:
        name: as written in plans.
        body: `package.module:function`, imported when values are computed. The function takes a list of contiguous
            tensors and the params, and returns a tensor, or a tensor and additive measures (see `compute.kernels`).
        info: dtype and shape of the result, from those of the inputs.
        needs: for rows `[start, stop)` of the result, the slice of each input (None: all of it); None instead of a
            tuple says that only the whole result can be computed. The kernel, run on those slices, gives those rows.
        workspace: bytes that the body allocates beyond inputs and result, for inputs of these shapes.
        rounds: the kernel rounds to a dtype named in its parameter `out`; asking for another dtype changes that
            parameter, so that a value is rounded once.
        cut: the parameters that give rows `[start, stop)`, where they are others than those of the whole: where in a
            block of a quantised weight the first row lies. None: the same.
        on_device: the body runs wherever its inputs lie, and draws nothing; else it is given tensors of the CPU.
    """

    name: str
    body: str
    info: Callable[[Infos, Params], TensorInfo]
    needs: Callable[[int, int, Infos, Params], tuple[Slice | None, ...] | None]
    workspace: Callable[[Infos, Params], int]
    rounds: bool = False
    cut: Callable[[int, int, Infos, Params], Params] | None = None
    on_device: bool = False


@cache
def find(name: str) -> KernelSpec:
    """The kernel registered under `name`, or brought by a registered PEFT method.

    Raises:
        Refused: no installed package registers it (`unknown-kernel`).
    """
    for point in named(KERNELS).get(name, ()):
        spec = point.load()
        if isinstance(spec, KernelSpec) and spec.name == name:
            return spec
    for plug_in in loaded(METHODS):
        for spec in getattr(plug_in, "kernels", ()):
            if isinstance(spec, KernelSpec) and spec.name == name:
                return spec
    raise Refused("unknown-kernel", f"no installed package provides the kernel `{show(name)}`", next=Command("list"))


def _out(params: Params) -> DType:
    return DType(params["out"])


def accumulates_wide(weight: str, params: Params) -> bool:
    """True where sums are taken in fp64: for `best` over, or into, 32 bits or more (`weight`: torch's dtype name)."""
    wide = {"float32", "float64"}
    return params["numerics"] == "best" and (weight.removeprefix("torch.") in wide or _out(params).torch_name in wide)


def _merge_info(inputs: Infos, params: Params) -> TensorInfo:
    return TensorInfo(_out(params), inputs[0].shape)


def _flags(params: Params, key: str) -> tuple[Scalar, ...]:
    value = params[key]
    assert isinstance(value, tuple)
    return value


def _lora_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...] | None:
    """Rows of W need the same rows of every B, or of every A's columns where W is stored `[in, out]`.

    DoRA's norm runs over the inputs of an output: over a row of `[out, in]`, over a column otherwise.
    """
    transposed = bool(params["transposed"])
    if transposed and any(_flags(params, "dora")):
        return None
    rows = Slice(0, start, stop - start)
    needs: list[Slice | None] = [rows]
    for dora in _flags(params, "dora"):
        needs += [Slice(1, start, stop - start), None] if transposed else [None, rows]
        if dora:
            needs.append(rows)
    return tuple(needs)


def _merge_workspace(inputs: Infos, params: Params) -> int:
    """Accumulator, delta and one temporary of the output's size, and every factor, in the accumulation dtype."""
    width = 8 if accumulates_wide(inputs[0].dtype.torch_name, params) else 4
    return width * (3 * inputs[0].numel + sum(i.numel for i in inputs[1:]))


LORA_MERGE = KernelSpec(
    "lora-merge",
    "converter.core.compute.kernels:lora_merge",
    _merge_info,
    _lora_needs,
    _merge_workspace,
    rounds=True,
    on_device=True,
)
"""`W + sum(scale_i * B_i @ A_i)`, DoRA included. Inputs: W `[out, in]` (or `[in, out]` with `transposed`), then for
each adapter A `[r, in]`, B `[out, r]` and, with DoRA, the magnitudes `[out]`. Params: `scales`, `dora` (one per
adapter), `transposed`, `delta_rounded` (PEFT's embeddings), `numerics`
(`best` or `peft`), `out`."""

LORA_CONV_MERGE = KernelSpec(
    "lora-conv-merge",
    "converter.core.compute.kernels:lora_conv_merge",
    _merge_info,
    lambda start, stop, inputs, params: None,
    _merge_workspace,
    rounds=True,
)
"""The same for convolutions: W `[out, in, *kernel]`, A `[r, in, *kernel]`, B `[out, r, 1, ...]`."""

BIAS_MERGE = KernelSpec(
    "bias-merge",
    "converter.core.compute.kernels:bias_merge",
    _merge_info,
    lambda start, stop, inputs, params: tuple(Slice(0, start, stop - start) for _ in inputs),
    _merge_workspace,
    rounds=True,
    on_device=True,
)
"""`bias + sum(scale_i * lora_B_i.bias)`, all `[out]`."""


def _residual_workspace(inputs: Infos, params: Params) -> int:
    """An fp32 copy of W, full U, S, V of its shape, LAPACK's own copy and work area, and the rank-r product."""
    rows, columns = inputs[0].shape
    small = min(rows, columns)
    return 4 * (3 * rows * columns + small * (rows + columns) + 8 * small * small)


RESIDUAL_BASE = KernelSpec(
    "residual-base",
    "converter.core.compute.kernels:residual_base",
    lambda inputs, params: inputs[0],
    lambda start, stop, inputs, params: None,
    _residual_workspace,
)
"""The base weight as PEFT leaves it after a PiSSA or OLoRA start: W minus `scale * B0 @ A0`, in W's dtype.
Params: `init` (`pissa` or `olora`), `rank`, `scale`, `transposed`."""


def _rows_of(params: Params) -> int:
    return len(_flags(params, "shift"))


HEAD_ROWS = KernelSpec(
    "head-rows",
    "converter.core.compute.kernels:head_rows",
    lambda inputs, params: TensorInfo(_out(params), (_rows_of(params), *inputs[0].shape[1:])),
    lambda start, stop, inputs, params: None,
    lambda inputs, params: 8 * inputs[0].numel + 16 * _rows_of(params) * inputs[0].numel // max(inputs[0].shape[0], 1),
    rounds=True,
)
"""Rows of a small head as sums of others: `(C @ W + shift) / divisor`, rounded once. Input: W `[n, h]`, or a bias
`[n]`. Params: `coefficients` (C, row by row), `shift` and `divisor` (one for each row that comes out), `out`."""

WEIGHTED_SUM = KernelSpec(
    "weighted-sum",
    "converter.core.compute.kernels:weighted_sum",
    _merge_info,
    lambda start, stop, inputs, params: tuple(Slice(0, start, stop - start) for _ in inputs),
    lambda inputs, params: 40 * inputs[0].numel,
    rounds=True,
    on_device=True,
)
"""`sum(share_i * W_i)` in fp64, in order, rounded once; all of one shape. Params: `shares`, `out`."""

DIFFERENCE = KernelSpec(
    "difference",
    "converter.core.compute.kernels:difference",
    _merge_info,
    lambda start, stop, inputs, params: tuple(Slice(0, start, stop - start) for _ in inputs),
    lambda inputs, params: 40 * inputs[0].numel,
    rounds=True,
    on_device=True,
)
"""`tuned - base` in fp64, rounded once. Inputs: base, tuned, of one shape. Params: `out`."""

HEAD_NORMAL = KernelSpec(
    "head-normal",
    "converter.core.compute.kernels:head_normal",
    lambda inputs, params: TensorInfo(_out(params), _shape(params)),
    lambda start, stop, inputs, params: None,
    lambda inputs, params: 40 * math.prod(_shape(params)),
    rounds=True,
)
"""Normal numbers from a seed, for a head that a user asked to be drawn: no inputs. Params: `seed`, `std`, `shape`,
`out`. The generator is written down with its body; the same seed gives the same numbers everywhere."""


def _shape(params: Params) -> tuple[int, ...]:
    return tuple(int(n) for n in _flags(params, "shape"))


def _permuted_info(inputs: Infos, params: Params) -> TensorInfo:
    dims = [int(n) for n in _flags(params, "dims")]
    return TensorInfo(inputs[0].dtype, tuple(inputs[0].shape[d] for d in dims))


def _permuted_needs(start: int, stop: int, inputs: Infos, params: Params) -> tuple[Slice | None, ...] | None:
    return (Slice(0, start, stop - start),) if _flags(params, "dims")[0] == 0 else None


PERMUTE = KernelSpec(
    "permute",
    "converter.core.compute.kernels:permute",
    _permuted_info,
    _permuted_needs,
    lambda inputs, params: inputs[0].nbytes,
    on_device=True,
)
"""The same values with their dimensions in another order, as `torch.permute` has it. Params: `dims`."""
