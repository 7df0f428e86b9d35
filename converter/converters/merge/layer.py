"""One tensor's merge: the updates of a module, and all adapters' updates of one tensor put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converter.converters.merge.adapter_keys import Module
from converter.converters.merge.methods.finding import variant_of
from converter.converters.merge.methods.method import AdapterConfig, Site, Update
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.kernel_specs import Param
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import show

MERGEABLE = frozenset({DType.F16, DType.BF16, DType.F32, DType.F64})


def updates_of(site: Site) -> tuple[Update, ...]:
    """A module's updates, as its method plans them, after what is checked for every method.

    Raises:
        Refused: a factor belongs to another method (`adapter-incomplete`), the base isn't floating point
            (`base-quantised`), an update that can't be weighted has a weight (`weights`), or whatever the method
            refuses.
    """
    method = site.config.method
    for factor in site.module.factors:
        name = factor.partition(".")[0]
        if name not in method.factors and factor not in method.factors:
            other = variant_of(name, method)
            why = f"which is of {other.title}, and {other.switch} is not set" if other else f"not of {method.title}"
            raise site.incomplete(f"the layer has a {show(name)}, {why}")
    for leaf in method.leaves(site.module):
        if site.base[leaf].dtype not in MERGEABLE:
            name = f"{site.target.rpartition('.')[0]}.{leaf}"
            raise Refused("base-quantised", f"{show(name)} is {site.base[leaf].dtype.value}", where=site.where)
    found = method.update(site)
    if found and site.weight != 1 and not method.is_linear:
        what = f"the update of {method.title} is not linear, so it can't be weighted"
        raise Refused("weights", what, where=site.where)
    return found


def merged(base: LazyTensor, updates: Sequence[Update], numerics: str) -> LazyTensor:
    """A tensor of the base with all updates, rounded to its own dtype.

    Updates of one kernel that can be taken together are; others follow one another. `best` rounds once, at the end:
    between two kernels a value stays in 32 bits, or in 64 over a base of 32.
    """
    weight = base
    groups = _groups(updates)
    for at, group in enumerate(groups):
        first = group[0]
        if first.start is not None:
            weight = tensors.apply(first.start.kernel, [weight], first.start.params)
        params = _joined(group)
        if numerics == "best" and at + 1 < len(groups) and first.kernel.rounds:
            params["out"] = (DType.F64 if base.info.dtype in (DType.F32, DType.F64) else DType.F32).value
        weight = tensors.apply(first.kernel, [weight, *(t for update in group for t in update.inputs)], params)
    return tensors.cast(weight, base.info.dtype)


def _groups(updates: Sequence[Update]) -> list[list[Update]]:
    groups: list[list[Update]] = []
    for update in updates:
        if groups and _can_join(groups[-1][-1], update):
            groups[-1].append(update)
        else:
            groups.append([update])
    return groups


def _can_join(before: Update, update: Update) -> bool:
    return (
        before.joins
        and update.joins
        and before.kernel == update.kernel
        and update.start is None
        and _scalars(before) == _scalars(update)
    )


def _scalars(update: Update) -> dict[str, Param]:
    return {key: value for key, value in update.params.items() if not isinstance(value, tuple)}


def _joined(group: Sequence[Update]) -> dict[str, Param]:
    """The parameters of one call for several updates: tuples one after another, the rest as all have it."""
    params: dict[str, Param] = dict(group[0].params)
    for update in group[1:]:
        for key, value in update.params.items():
            before = params[key]
            if isinstance(before, tuple) and isinstance(value, tuple):
                params[key] = (*before, *value)
    return params


def merged_alone(
    module: Module, base: Mapping[str, LazyTensor], config: AdapterConfig, where: str
) -> dict[str, LazyTensor]:
    """A module that an adapter brings with its own weight, with the updates over it folded in, rounded once.

    Args:
        base: the module's tensors by their last name.
    """
    if not module.factors:
        return dict(base)
    infos = {leaf: tensor.info for leaf, tensor in base.items()}
    site = Site(module, config, f"{module.name}.weight", infos, {}, 1.0, "best", where)
    found = dict(base)
    for leaf, updates in by_leaf(updates_of(site)).items():
        found[leaf] = merged(base[leaf], updates, "best")
    return found


def by_leaf(updates: Sequence[Update]) -> dict[str, list[Update]]:
    """Updates by the tensor of the module that they change."""
    found: dict[str, list[Update]] = {}
    for update in updates:
        found.setdefault(update.leaf, []).append(update)
    return found


def with_token_rows(weight: LazyTensor, rows: LazyTensor, indices: tuple[int, ...]) -> LazyTensor:
    """An embedding with some rows replaced by trained ones.

    Raises:
        Refused: an index past the vocabulary, or rows of another width (`adapter-tokens`).
    """
    vocabulary, width = weight.info.shape
    if max(indices, default=0) >= vocabulary or rows.info.shape != (len(indices), width):
        raise Refused(
            "adapter-tokens", f"token rows {list(rows.info.shape)} do not fit an embedding {list(weight.info.shape)}"
        )
    parts: list[LazyTensor] = []
    position = 0
    trained = tensors.cast(rows, weight.info.dtype)
    for token, row in sorted(zip(indices, range(len(indices)), strict=True)):
        parts.append(tensors.narrow(weight, 0, position, token - position))
        parts.append(tensors.narrow(trained, 0, row, 1))
        position = token + 1
    parts.append(tensors.narrow(weight, 0, position, vocabulary - position))
    return tensors.concat([p for p in parts if p.info.shape[0]], 0)
