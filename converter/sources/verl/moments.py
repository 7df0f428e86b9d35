"""Adam's moments in verl's optimizer files, by the names of their parameters.

The files number parameters in the model's order and hold no names. Under FSDP2 each moment is a DTensor of its
parameter's shape. FSDP1 keeps stretches of flat tensors: of one parameter (`use_orig_params`), or of all that one
wrapped module holds, and what was wrapped is recorded nowhere: it is taken from names as verl wraps (layers, what is
left, and each LoRA factor by itself) and believed only if every length on every rank fits.

Source: `get_fsdp_wrap_policy` in https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/fsdp_utils.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.words import OUTPUTS
from converter.sources.verl.agreement import expect_one_schedule, expect_same_groups
from converter.sources.verl.shards import Piece, Ranks, Value
from converter.sources.verl.weights import Weights
from converter.text import show

State = Literal["exp_avg", "exp_avg_sq"]
_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.)")
_FACTOR = re.compile(r"(.+\.lora_[A-Za-z_]+\.[^.]+)\.[^.]+")


def moments(ranks: Ranks, weights: Weights, state: State, *, tied: bool = False) -> dict[str, LazyTensor]:
    """One moment of every trained parameter.

    Args:
        tied: the config ties output embeddings to the input's; FSDP1 saves such a parameter under both names.

    Raises:
        Refused: files missing (`verl-rank-missing`), another optimizer or layout (`verl-optimizer`).
    """
    files = ranks.files
    if not files.optimizers:
        raise ranks.refuse("verl-optimizer", "no optimizer was saved with the model")
    lost = [r for r in weights.order if r not in files.optimizers]
    if lost:
        listed = ", ".join(map(str, lost[:16]))
        what = f"optimizer files of rank {listed} of {files.world} are missing"
        advice = "copy them from the nodes that wrote them"
        raise ranks.refuse("verl-rank-missing", f"{what}: with each, a part of every moment is lost", next=advice)
    held: dict[int, dict[int, Value]] = {}
    counts = set()
    steps: dict[int, Value] = {}
    for rank in weights.order:
        count, held[rank], step = _states(ranks, rank, state)
        counts.add(count)
        steps |= {} if step is None else {rank: step}
    if len(counts) != 1:
        raise ranks.refuse("verl-mixed", "the optimizer files number different parameters: they are of two runs")
    if steps:
        ranks.whole("the optimizer's step", steps, files.optimizers)  # of two steps: refused
    expect_same_groups(ranks, weights.order)
    expect_one_schedule(ranks)
    if not any(held.values()):
        raise ranks.refuse("verl-optimizer", f"the optimizer keeps no {state}: no step of Adam was saved")
    (count,) = counts
    names = parameters(weights, tied)
    if any(isinstance(v, Piece) or len(v.info.shape) != 1 for own in held.values() for v in own.values()):
        found = _by_shape(ranks, weights, names, held, count)
    elif count == len(names) and (whole := _by_parameter(weights, names, held)) is not None:
        found = whole
    else:
        found = _by_unit(weights, names, held, count)
    if found is None:
        raise _unknown_order(ranks, len(names), count)
    return found


def _unknown_order(ranks: Ranks, have: int, count: int) -> Refused:
    return ranks.refuse(
        "verl-optimizer",
        f"the optimizer numbers {count} parameters without names, and nothing shows which of the model's {have} they "
        "are",
    )


def _states(ranks: Ranks, rank: int, state: State) -> tuple[int, dict[int, Value], Value | None]:
    """How many parameters the optimizer has, a rank's values by their numbers, and the step that it counted."""
    file = ranks.files.optimizers[rank]
    saved = ranks.open(file)
    entries, groups = saved.get("state"), saved.get("param_groups")
    params = groups[0].get("params") if isinstance(groups, list) and len(groups) == 1 else None
    if not isinstance(entries, dict) or not isinstance(params, list) or params != list(range(len(params))):
        what = "this is not the state of one group of numbered parameters, which verl's optimizers save"
        raise ranks.refuse("verl-optimizer", what, file=file)
    found: dict[int, Value] = {}
    for number, own in entries.items():
        saved_value = own.get(state) if isinstance(own, dict) else None
        value = None if saved_value is None else ranks.value(saved_value, file, f"{state} {number}")
        if value is not None and type(number) is int and number < len(params):
            found[number] = value
        elif saved_value is not None:
            raise ranks.refuse("verl-malformed", f"{state} of {show(number)} is not a tensor of a parameter", file=file)
    step = next((own["step"] for own in entries.values() if isinstance(own, dict) and "step" in own), None)
    return len(params), found, ranks.value(step, file, "step")


def parameters(weights: Weights, tied: bool) -> list[str]:
    """The model's parameters in order, each once."""
    again = {n for group in weights.shared for n in group[1:]}
    if tied and not again:
        heads = [n for n in weights.sharded if n.endswith(OUTPUTS)]
        again |= {h for h in heads if weights.tensors[h].info == weights.tensors[weights.sharded[0]].info}
    return [n for n in weights.sharded if n not in again]


def _by_shape(
    ranks: Ranks, weights: Weights, names: Sequence[str], held: Mapping[int, Mapping[int, Value]], count: int
) -> dict[str, LazyTensor] | None:
    """FSDP2, or one rank alone: every moment has its parameter's shape."""
    numbers = list(range(count))
    if count != len(names) and all(".lora_" in n for n in names):
        numbers = _with_state(held)  # saved with save_lora_only: what is frozen has a number and no name
    if len(numbers) != len(names):
        return None
    found: dict[str, LazyTensor] = {}
    for number, name in zip(numbers, names, strict=True):
        values = {r: own[number] for r, own in held.items() if number in own}
        if not values:
            continue
        whole = ranks.whole(f"the moment of {name}", values, ranks.files.optimizers)
        if whole is None or whole.info.shape != weights.tensors[name].info.shape:
            return None
        found[name] = whole
    return found


def _by_parameter(
    weights: Weights, names: Sequence[str], held: Mapping[int, Mapping[int, Value]]
) -> dict[str, LazyTensor] | None:
    """FSDP1 with `use_orig_params`: each rank has the stretch of the parameter that lies in its shard, if any."""
    found: dict[str, LazyTensor] = {}
    for number, name in enumerate(names):
        parts = [v for own in held.values() if not isinstance(v := own.get(number), Piece | None)]
        if not parts:
            continue
        shape = weights.tensors[name].info.shape
        if sum(p.info.numel for p in parts) != math.prod(shape):
            return None
        found[name] = tensors.reshape(tensors.concat(parts, 0), shape)
    return found


def _by_unit(
    weights: Weights, names: Sequence[str], held: Mapping[int, Mapping[int, Value]], count: int
) -> dict[str, LazyTensor] | None:
    """FSDP1 as verl runs it: each rank has an equal stretch of all parameters of a wrapped module, laid end to end."""
    units = wrapped_units(weights, names, held, count)
    if units is None:
        return None
    found: dict[str, LazyTensor] = {}
    for number, unit in units.items():
        flat = tensors.concat([v for own in held.values() if isinstance(v := own[number], LazyTensor)], 0)
        at = 0
        for name in unit:
            info = weights.tensors[name].info
            found[name] = tensors.reshape(tensors.narrow(flat, 0, at, info.numel), info.shape)
            at += info.numel
    return found


def wrapped_units(
    weights: Weights, names: Sequence[str], held: Mapping[int, Mapping[int, Value]], count: int
) -> dict[int, list[str]] | None:
    """The parameters that FSDP1 laid end to end, by their number in the optimizer; None where no lengths fit.

    Frozen units have no state, and are left out.
    """
    factors = _factors(names)
    ways = [(factors, _with_state(held))] if factors else [(units, list(range(count))) for units in _units(names)]
    for units, numbers in ways:
        if len(units) != len(numbers):
            continue
        own = {n: u for n, u in zip(numbers, units, strict=True) if any(n in state for state in held.values())}
        if all(_fits(weights, unit, [state.get(n) for state in held.values()]) for n, unit in own.items()):
            return own
    return None


def _with_state(held: Mapping[int, Mapping[int, Value]]) -> list[int]:
    return sorted({n for own in held.values() for n in own})


def _factors(names: Sequence[str]) -> list[list[str]]:
    """LoRA's factors, each wrapped by itself; what else there is is frozen then."""
    factors: dict[str, list[str]] = {}
    for name in names:
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], []).append(name)
    return list(factors.values())


def _units(names: Sequence[str]) -> list[list[list[str]]]:
    """Parameters by wrapped module, in the order in which an optimizer meets them: layers first or nothing wrapped."""
    layers: dict[str, list[str]] = {"": []}
    for name in names:
        match = _LAYER.match(name)
        layers.setdefault(match[0] if match else "", []).append(name)
    return [[u for u in layers.values() if u], [list(names)]]


def _fits(weights: Weights, unit: Sequence[str], parts: Sequence[Value | None]) -> bool:
    """True where each rank's stretch is as long as the parameters of a unit make it."""
    share = -(-sum(weights.tensors[n].info.numel for n in unit) // len(parts))
    return all(isinstance(p, LazyTensor) and p.info.shape == (share,) for p in parts)


def trained_names(ranks: Ranks, weights: Weights, *, tied: bool = False) -> frozenset[str] | None:
    """Names that the optimizer kept state for; None where no optimizer file tells."""
    try:
        return frozenset(moments(ranks, weights, "exp_avg", tied=tied))
    except Refused as refusal:
        if refusal.code in ("verl-rank-missing", "verl-optimizer"):
            return None
        raise
