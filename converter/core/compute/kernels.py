"""Bodies of the kernels: pure torch functions on contiguous CPU tensors.

Numerics. `peft` repeats, operation by operation, what `PeftModel.from_pretrained(...).merge_and_unload()` does on the
CPU; the order of operations is therefore not ours to change. `best` adds all adapters in the accumulation dtype (fp32,
or fp64 over an fp32 base) and rounds once. Both take row chunks: the bits do not depend on the chunking as long as
heights are multiples of 64 (`converter.core.writer.plan.ROW_MULTIPLE`).

Measures are sums over elements, so that those of chunks add up:
`base` = ||W||^2, `update` = ||D||^2 with D the exact update, `effective` = <W' - W, D> with W' as stored,
`elements`, and where anything is not finite `nonfinite_kept` and `nonfinite_new`.

Source of the formulas: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py and `dora.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.core.compute.measures import Measures
from converter.core.tensors.dtypes import DType
from converter.core.tensors.kernel_specs import accumulates_wide


@dataclass(frozen=True)
class _Factors:
    """One adapter's part of a merge: A, B, the magnitudes of DoRA or None, and the scale."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float


def _out_dtype(params: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DType(params["out"]).torch_name)
    return dtype


def _accumulation(weight: Tensor, params: Mapping[str, Any]) -> torch.dtype:
    return torch.float64 if accumulates_wide(str(weight.dtype), params) else torch.float32


def _adapters(inputs: list[Tensor], params: Mapping[str, Any], dtype: torch.dtype) -> list[_Factors]:
    """The adapters' tensors in the accumulation dtype: 16-bit files widen exactly, as PEFT's autocast does."""
    found: list[_Factors] = []
    rest = iter(inputs)
    for scale, dora in zip(params["scales"], params["dora"], strict=True):
        a, b = next(rest).to(dtype), next(rest).to(dtype)
        found.append(_Factors(a, b, next(rest).to(dtype) if dora else None, float(scale)))
    return found


def lora_merge(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures]:
    """W plus every adapter's update; see `converter.core.tensors.kernel_specs.LORA_MERGE`."""
    transposed = bool(params["transposed"])

    def delta(f: _Factors) -> Tensor:
        product = f.b @ f.a
        return (product.T if transposed else product).mul_(f.scale)

    def norm(weight: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.norm(weight.T if transposed else weight, dim=1)
        return norms

    def along(factor: Tensor) -> Tensor:
        return factor.view(1, -1) if transposed else factor.view(-1, 1)

    return _merge(inputs, params, delta, norm, along)


def lora_conv_merge(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures]:
    """The same for convolutions; see `converter.core.tensors.kernel_specs.LORA_CONV_MERGE`."""
    weight = inputs[0]
    spatial = weight.dim() - 2
    convolve = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[spatial]

    def delta(f: _Factors) -> Tensor:
        if spatial == 2 and weight.shape[2:] == (1, 1):
            product = f.b.squeeze(3).squeeze(2) @ f.a.squeeze(3).squeeze(2)
            pointwise: Tensor = product.unsqueeze(2).unsqueeze(3) * f.scale
            return pointwise
        update: Tensor = convolve(f.a.transpose(0, 1), f.b).transpose(0, 1) * f.scale
        return update

    def norm(merged: Tensor) -> Tensor:
        norms: Tensor = merged.norm(p=2, dim=tuple(range(1, merged.dim())), keepdim=True)
        return norms.transpose(1, 0)

    def along(factor: Tensor) -> Tensor:
        return factor.reshape(-1, *[1] * (weight.dim() - 1))

    return _merge(inputs, params, delta, norm, along)


def _merge(
    inputs: list[Tensor], params: Mapping[str, Any], delta: Any, norm: Any, along: Any
) -> tuple[Tensor, Measures]:
    accumulate = _accumulation(inputs[0], params)
    out_dtype = _out_dtype(params)
    weight = inputs[0]
    adapters = _adapters(inputs[1:], params, accumulate)
    if params["numerics"] == "peft":
        rounded = bool(params.get("delta_rounded"))
        merged, exact = _merge_in_turn(weight.to(out_dtype), adapters, rounded, delta, norm, along)
        base = weight.to(exact.dtype)
        return merged, measured(base, exact - base, merged, inputs)
    base = weight.to(accumulate)
    exact, update = _merge_exactly(base, adapters, delta, norm, along)
    merged = exact.to(out_dtype)
    return merged, measured(base, update, merged, inputs)


def _merge_exactly(base: Tensor, adapters: list[_Factors], delta: Any, norm: Any, along: Any) -> tuple[Tensor, Tensor]:
    """All updates in the accumulation dtype, and their sum; DoRA rescales what stands before it, by the norm over W."""
    if len(adapters) == 1 and adapters[0].magnitude is None:
        update = delta(adapters[0])
        return base + update, update
    merged = base
    for f in adapters:
        update = delta(f)
        if f.magnitude is not None:
            factor = along(f.magnitude.flatten() / norm(base + update).flatten())
            merged = factor * (merged + update)
        else:
            merged = merged + update
    return merged, merged - base


def _merge_in_turn(
    weight: Tensor, adapters: list[_Factors], delta_rounded: bool, delta: Any, norm: Any, along: Any
) -> tuple[Tensor, Tensor]:
    """What PEFT does, one adapter after another with a rounding each; and the last sum before its rounding.

    For a DoRA adapter that is not the first, PEFT takes the merged ones out again, measures the norm of what is left,
    and merges them anew; each step rounds, so the result drifts, and is repeated here to the bit.
    """

    def step(merged: Tensor, unmerged: Tensor, f: _Factors) -> tuple[Tensor, Tensor, Tensor | None]:
        update = delta(f)
        if f.magnitude is not None:
            factor = along(f.magnitude.view(-1) / norm(unmerged + update).view(-1))
            exact = factor * (merged + update)
            return exact.to(weight.dtype), exact, factor
        exact = merged + update
        return (merged + update.to(merged.dtype) if delta_rounded else exact.to(weight.dtype)), exact, None

    merged, exact, unmerged = weight, weight, weight
    factors: list[Tensor | None] = []
    for done, f in enumerate(adapters):
        if f.magnitude is not None and done:
            for earlier, factor in zip(reversed(adapters[:done]), reversed(factors), strict=True):
                update = delta(earlier)
                taken = merged - update.to(weight.dtype) if factor is None else merged / factor - update
                merged = taken.to(weight.dtype)
            unmerged = merged
            for at, earlier in enumerate(adapters[:done]):
                merged, exact, factors[at] = step(merged, unmerged, earlier)
        merged, exact, factor = step(merged, unmerged, f)
        factors.append(factor)
    return merged, exact


def measured(base: Tensor, update: Tensor, merged: Tensor, inputs: list[Tensor]) -> Measures:
    """Norms of base and update, and how much of the update survived the rounding. The finite check rides along:
    a value that is not finite makes `update` or `effective` not finite, and only then is it counted exactly.
    """
    wide = merged.to(base.dtype)
    effective = (wide - base if wide is merged else wide.sub_(base)).flatten()
    flat_base, flat_update = base.flatten(), update.flatten()
    measures = {
        "base": float(torch.dot(flat_base, flat_base)),
        "update": float(torch.dot(flat_update, flat_update)),
        "effective": float(torch.dot(effective, flat_update)),
        "elements": float(base.numel()),
    }
    if not all(map(_is_finite, measures.values())):
        measures |= _count_nonfinite(inputs[0], merged, inputs)
    return measures


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _count_nonfinite(weight: Tensor, merged: Tensor, inputs: list[Tensor]) -> Measures:
    """Values that were not finite before the merge count as kept, wherever in the inputs they came from."""
    bad = ~torch.isfinite(merged)
    inherited = not all(bool(torch.isfinite(i).all()) for i in inputs[1:])
    kept = bad if inherited else bad & ~torch.isfinite(weight)
    return {"nonfinite_kept": float(kept.sum()), "nonfinite_new": float(bad.sum() - kept.sum())}


def bias_merge(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures]:
    """A bias plus every `lora_B.bias * scale`; see `converter.core.tensors.kernel_specs.BIAS_MERGE`."""
    accumulate = _accumulation(inputs[0], params)
    out_dtype = _out_dtype(params)
    exact = inputs[0].to(accumulate if params["numerics"] == "best" else out_dtype)
    merged = exact
    for bias, scale in zip(inputs[1:], params["scales"], strict=True):
        exact = merged + bias.to(accumulate) * float(scale)
        merged = exact if params["numerics"] == "best" else exact.to(out_dtype)
    merged = merged.to(out_dtype)
    base = inputs[0].to(exact.dtype)
    return merged, measured(base, exact - base, merged, inputs)


def residual_base(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """W less the low-rank part that a PiSSA or OLoRA start moved into the adapter, rebuilt as PEFT does on load.

    On one thread: LAPACK's last bits depend on how many there are, and the same inputs must give the same bytes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _residual(inputs[0], params)
    finally:
        torch.set_num_threads(threads)


def _residual(weight: Tensor, params: Mapping[str, Any]) -> Tensor:
    rank, scale = int(params["rank"]), float(params["scale"])
    if params["init"] == "olora":
        full = weight.to(torch.float32, copy=True)
        q, r = torch.linalg.qr(full)
        full -= scale * q[:, :rank].contiguous() @ r[:rank].contiguous()
        return full.to(weight.dtype)
    transposed = bool(params["transposed"])
    full = weight.to(torch.float32)
    full = full.T if transposed else full
    v, s, u = torch.linalg.svd(full, full_matrices=False)
    s = s[:rank] / scale
    a = torch.diag(torch.sqrt(s)) @ u[:rank]
    b = v[:, :rank] @ torch.diag(torch.sqrt(s))
    left: Tensor = (full - scale * b @ a).to(weight.dtype)
    return left.T.contiguous() if transposed else left


def weighted_sum(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures]:
    """Models' tensors times their shares; see `converter.core.tensors.kernel_specs.WEIGHTED_SUM`."""
    base = inputs[0].to(torch.float64)
    exact = base * float(params["shares"][0])
    for share, other in zip(params["shares"][1:], inputs[1:], strict=True):
        exact += other.to(torch.float64) * float(share)
    mean = exact.to(_out_dtype(params))
    return mean, measured(base, exact - base, mean, inputs)


def difference(inputs: list[Tensor], params: Mapping[str, Any]) -> tuple[Tensor, Measures]:
    """What makes the second tensor of the first; see `converter.core.tensors.kernel_specs.DIFFERENCE`."""
    base = inputs[0].to(torch.float64)
    exact = inputs[1].to(torch.float64) - base
    rounded = exact.to(_out_dtype(params))
    return rounded, measured(base, exact, base + rounded.to(torch.float64), inputs)


def head_rows(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Sums of a head's rows, in fp32, or in fp64 where 32 bits are written; see `kernel_specs.HEAD_ROWS`."""
    weight = inputs[0]
    out_dtype = _out_dtype(params)
    dtype = torch.float64 if out_dtype in (torch.float32, torch.float64) else torch.float32
    rows = len(params["shift"])
    coefficients = torch.tensor(params["coefficients"], dtype=dtype).view(rows, weight.shape[0])
    along = [rows, *[1] * (weight.dim() - 1)]
    shift = torch.tensor(params["shift"], dtype=dtype).view(along)
    divisor = torch.tensor(params["divisor"], dtype=dtype).view(along)
    return ((coefficients @ weight.to(dtype) + shift) / divisor).to(out_dtype)


def head_normal(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Normal numbers, row by row: Box and Muller's transform of Python's Mersenne Twister, seeded with the integer.

    `random.Random(seed).random()` is the one generator whose sequence Python promises to keep; each pair u, v of it
    gives `sqrt(-2 ln(1-u)) cos(2 pi v)` and the same with sin, in this order.
    """
    draw = random.Random(int(params["seed"])).random  # noqa: S311  # a head's start, not a secret
    count = math.prod(params["shape"])
    values: list[float] = []
    while len(values) < count:
        radius, angle = math.sqrt(-2.0 * math.log(1.0 - draw())), 2.0 * math.pi * draw()
        values += (radius * math.cos(angle), radius * math.sin(angle))
    drawn = torch.tensor(values[:count], dtype=torch.float64).mul_(float(params["std"]))
    return drawn.view(*params["shape"]).to(_out_dtype(params))


def permute(inputs: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Dimensions in another order; see `converter.core.tensors.kernel_specs.PERMUTE`."""
    return inputs[0].permute([int(n) for n in params["dims"]]).contiguous()
