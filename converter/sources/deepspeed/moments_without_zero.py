"""Adam's moments without ZeRO: torch's own state, by the parameters' numbers and not by their names.

A number says which parameter of which group it was when the optimizer was made. The names are in the state where the
optimizer got named parameters (torch 2.6 and later). Else a shape that one tensor has is proof; where several have it,
the order among them is that of the model for all who make their groups by walking over it, and nothing in the file
says that they did.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.state import Shards
from converter.text import fold

MOMENTS_ORDER = "moments-order"


def plain_moments(
    shards: Shards, which: Literal["exp_avg", "exp_avg_sq"], allow: Collection[str]
) -> dict[str, LazyTensor]:
    """Adam's first or second moment by parameter name.

    Raises:
        Refused: there is no state of Adam by parameter (`zero-no-masters`), it is not of this model (`zero-sizes`), or
            its order is proved by nothing (`moments-order`, which may be allowed, and `moments-ambiguous`).
    """
    states = _states(shards, which)
    named = _names(shards, states)
    if named is None:
        named = _by_shape(shards, states, allow)
    return {name: states[number][1] for name, number in named.items()}


def _states(shards: Shards, which: str) -> dict[Any, tuple[int, LazyTensor]]:
    """Group and moment of each number, in the optimizer's order."""
    groups = _groups(shards)
    state = _inner(shards).get("state")
    found: dict[Any, tuple[int, LazyTensor]] = {}
    for index, group in enumerate(groups):
        for number in _list(group.get("params")):
            own = state.get(number) if isinstance(state, dict) and isinstance(number, int) else None
            moment = own.get(which) if isinstance(own, dict) else None
            if isinstance(moment, LazyTensor):
                found[number] = (index, moment)
    if not found:
        text = "without ZeRO the model file has the optimizer's state, and here there is none of Adam by parameter"
        raise shards.refuse("zero-no-masters", text, file=shards.model_file())
    return found


def _groups(shards: Shards) -> list[Mapping[Any, Any]]:
    return [g for g in _list(_inner(shards).get("param_groups")) if isinstance(g, dict)]


def _inner(shards: Shards) -> Mapping[Any, Any]:
    """torch's state: as it is in fp32, below DeepSpeed's own in 16 bits."""
    outer = shards.model().get("optimizer")
    inner = outer.get("optimizer_state_dict", outer) if isinstance(outer, dict) else None
    return inner if isinstance(inner, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _weights(shards: Shards) -> dict[str, LazyTensor]:
    """Tensors of the model in its order, buffers and second names of shared ones left out."""
    module = shards.model().get("module")
    buffers = set(_list(shards.model().get("buffer_names")))
    found: dict[str, LazyTensor] = {}
    seen: set[LazyTensor] = set()
    for name, tensor in (module if isinstance(module, dict) else {}).items():
        if isinstance(tensor, LazyTensor) and name not in buffers and tensor not in seen:
            found[name] = tensor
            seen.add(tensor)
    return found


def _names(shards: Shards, states: Mapping[Any, tuple[int, LazyTensor]]) -> dict[str, Any] | None:
    """Numbers by the names that the optimizer was given, if it was."""
    weights = _weights(shards)
    found: dict[str, Any] = {}
    for group in _groups(shards):
        numbers, names = _list(group.get("params")), _list(group.get("param_names"))
        if len(numbers) != len(names):
            return None
        for name, number in zip(names, numbers, strict=True):
            if not isinstance(number, int) or number not in states:
                continue
            plain = str(name) if str(name) in weights else str(name).removeprefix("module.")
            if plain not in weights or weights[plain].info.shape != states[number][1].info.shape:
                return None
            found[plain] = number
    return found


def _by_shape(shards: Shards, states: Mapping[Any, tuple[int, LazyTensor]], allow: Collection[str]) -> dict[str, Any]:
    """Numbers by name, where a shape has as many parameters as moments, all in one group."""
    named: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in _weights(shards).items():
        named.setdefault(tensor.info.shape, []).append(name)
    numbered: dict[tuple[int, ...], list[Any]] = {}
    for number, (_, moment) in states.items():
        numbered.setdefault(moment.info.shape, []).append(number)
    for shape, numbers in numbered.items():
        names = named.get(shape, [])
        if len(numbers) > len(names):
            text = f"Adam has {len(numbers)} moments of shape {list(shape)}, the model {len(names)} such parameters"
            raise shards.refuse("zero-sizes", text, file=shards.model_file())
        groups = {states[n][0] for n in numbers}
        if len(numbers) < len(names) or (len(groups) > 1 and len(numbers) > 1):
            why = "some were frozen" if len(numbers) < len(names) else "they were in several groups"
            text = f"{len(names)} parameters have shape {list(shape)}, {why}, and nothing says which moment is whose"
            raise shards.refuse(
                "moments-ambiguous",
                f"{text}: {fold(names)}",
                file=shards.model_file(),
                next="read them where the optimizer is, with DeepSpeed: safe_get_full_optimizer_state",
            )
    several = [n for shape, numbers in numbered.items() if len(numbers) > 1 for n in named[shape]]
    if several and MOMENTS_ORDER not in allow:
        raise shards.refuse(
            MOMENTS_ORDER,
            f"without ZeRO moments have numbers and no names, and {len(several)} parameters share their shape with "
            f"others: {fold(several)}",
            file=shards.model_file(),
            next='if the optimizer got them in the model\'s order, as from model.parameters(): allow=["moments-order"]',
        )
    return {
        name: number for shape, numbers in numbered.items() for name, number in zip(named[shape], numbers, strict=True)
    }
