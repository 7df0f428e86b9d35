"""What becomes of one tensor of megatron-core: the parts of it that transformers has names for, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.kernel_specs import PERMUTE
from converter.core.tensors.nodes import Filled, LazyTensor, apply, concat, narrow, reshape
from converter.families.megatron.delta_net import DeltaSizes, gated_queries, one_more, projections
from converter.families.megatron.rows import Formula, Row


@dataclass(frozen=True)
class Sizes:
    """Numbers of a config.json that names and cuts depend on.

    Attributes:
        head: a head's size, which need not be the hidden size over the number of heads.
        delta: of layers with linear attention.
    """

    layers: int
    vocabulary: int
    heads: int
    groups: int
    head: int
    delta: DeltaSizes | None = None

    @property
    def qkv(self) -> int:
        """Rows of a fused projection: each group's queries, its key and its value."""
        return (self.heads + 2 * self.groups) * self.head


class SizeError(ValueError):
    """A tensor that has not the rows that config.json implies, in words."""


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """The sizes that a config says.

    Raises:
        SizeError: it lacks one, or heads do not make whole groups.
    """
    found = {}
    for key in ("num_hidden_layers", "vocab_size", "num_attention_heads", "hidden_size"):
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise SizeError(f"config.json has no {key}")
        found[key] = value
    heads = found["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or found["hidden_size"] // heads
    if type(groups) is not int or type(head) is not int or groups < 1 or heads % groups or head < 1:
        raise SizeError(f"{heads} heads of config.json do not make {groups} groups")
    return Sizes(found["num_hidden_layers"], found["vocab_size"], heads, groups, head, DeltaSizes.of(config))


def parts(row: Row, tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    """The tensors that transformers makes of one, by name; `{E}` of names is filled in.

    Raises:
        SizeError: it has other rows than the sizes imply.
    """
    return _FORMULAS[row.formula](row.theirs, tensor, sizes)


def joined(row: Row, held: Mapping[str, LazyTensor], sizes: Sizes, *, rows: int) -> LazyTensor:
    """Megatron's tensor of those that transformers has, by the names of the row: what `parts` takes apart.

    Args:
        rows: of the vocabulary, with padding; rows that no token has are zero.

    Raises:
        SizeError: they have other rows than the sizes imply.
    """
    if row.formula in ("experts", "expert-halves"):
        count = sum(1 for n in held) // len(row.theirs)
        each = [
            _joined(row.formula, tuple(n.replace("{E}", str(e)) for n in row.theirs), held, sizes, rows)
            for e in range(count)
        ]
        return concat([reshape(t, (1, *t.info.shape)) for t in each], 0)
    return _joined(row.formula, row.theirs, held, sizes, rows)


def _joined(
    formula: Formula, names: tuple[str, ...], held: Mapping[str, LazyTensor], sizes: Sizes, rows: int
) -> LazyTensor:
    found = [held[n] for n in names]
    if formula == "vocabulary":
        return _padded(found[0], sizes, rows)
    if formula == "qkv":
        return _fused(found, sizes)
    if formula == "stack":
        return _transposed(found[0])
    if formula == "stack-halves":
        return _halves_in_order(found[0])
    if len(found) == 2 and found[0].info != found[1].info:
        shapes = " and ".join(str(list(t.info.shape)) for t in found)
        raise SizeError(f"gate and up projection have the shapes {shapes}")
    return concat(found, 0) if len(found) > 1 else found[0]


def _padded(tensor: LazyTensor, sizes: Sizes, rows: int) -> LazyTensor:
    have = _rows(tensor)
    if have != sizes.vocabulary:
        raise SizeError(f"it has {have} rows, and config.json a vocabulary of {sizes.vocabulary}")
    if rows == have:
        return tensor
    empty = TensorInfo(tensor.info.dtype, (rows - have, *tensor.info.shape[1:]))
    return concat([tensor, Filled(empty, 0)], 0)


def _fused(found: list[LazyTensor], sizes: Sizes) -> LazyTensor:
    """Each group's queries, its key and its value."""
    each = (sizes.heads // sizes.groups * sizes.head, sizes.head, sizes.head)
    if [_rows(t) for t in found] != [sizes.groups * n for n in each]:
        many = f"{sizes.heads} heads in {sizes.groups} groups of {sizes.head}"
        raise SizeError(f"queries, keys and values have {[_rows(t) for t in found]} rows, and config.json {many}")
    return concat([narrow(t, 0, g * n, n) for g in range(sizes.groups) for t, n in zip(found, each, strict=True)], 0)


def _same(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    return {names[0]: tensor}


def _vocabulary(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    rows = _rows(tensor)
    if rows < sizes.vocabulary:
        raise SizeError(f"it has {rows} rows, and config.json a vocabulary of {sizes.vocabulary}")
    return {names[0]: narrow(tensor, 0, 0, sizes.vocabulary)}


def _qkv(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    if _rows(tensor) != sizes.qkv:
        many = f"{sizes.heads} heads in {sizes.groups} groups of {sizes.head} make {sizes.qkv}"
        raise SizeError(f"it has {_rows(tensor)} rows, and config.json's {many}")
    queries = sizes.heads // sizes.groups * sizes.head
    step = queries + 2 * sizes.head
    spans = ((0, queries), (queries, sizes.head), (queries + sizes.head, sizes.head))
    return {
        name: concat([narrow(tensor, 0, group * step + start, length) for group in range(sizes.groups)], 0)
        for name, (start, length) in zip(names, spans, strict=True)
    }


def _gated_qkv(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    queries = sizes.heads // sizes.groups
    step = (2 * queries + 2) * sizes.head
    if _rows(tensor) != sizes.groups * step:
        many = f"{sizes.heads} heads with gates in {sizes.groups} groups of {sizes.head} make {sizes.groups * step}"
        raise SizeError(f"it has {_rows(tensor)} rows, and config.json's {many}")
    starts = [group * step for group in range(sizes.groups)]
    gated = [part for start in starts for part in gated_queries(tensor, start, queries, sizes.head)]
    behind = [start + 2 * queries * sizes.head for start in starts]
    keys = [narrow(tensor, 0, at, sizes.head) for at in behind]
    values = [narrow(tensor, 0, at + sizes.head, sizes.head) for at in behind]
    return {name: concat(parts, 0) for name, parts in zip(names, (gated, keys, values), strict=True)}


def _delta(tensor: LazyTensor, sizes: Sizes, parts: int) -> DeltaSizes:
    """The sizes of a gated delta net, where a tensor has the rows of its first parts.

    Raises:
        SizeError: config.json has none, or others.
    """
    wanted = None if sizes.delta is None else sum(sizes.delta.projections[:parts])
    if sizes.delta is None or _rows(tensor) != wanted:
        raise SizeError(f"it has {_rows(tensor)} rows, and config.json's heads of linear attention make {wanted}")
    return sizes.delta


def _delta_projections(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    return dict(zip(names, projections(tensor, _delta(tensor, sizes, 6)), strict=True))


def _delta_channels(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    _delta(tensor, sizes, 3)
    return {names[0]: tensor}


def _one_more(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    return {names[0]: one_more(tensor)}


def _halves(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    if _rows(tensor) % 2:
        raise SizeError(f"it has {_rows(tensor)} rows, which are no gate and up projection")
    half = _rows(tensor) // 2
    return {name: narrow(tensor, 0, n * half, half) for n, name in enumerate(names)}


def _stack(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    return {names[0]: _transposed(tensor)}


def _transposed(tensor: LazyTensor) -> LazyTensor:
    """`[e, a, b]` as `[e, b, a]`."""
    if len(tensor.info.shape) != 3:
        raise SizeError(f"it is of the shape {list(tensor.info.shape)}, which is not a matrix for each expert")
    return apply(PERMUTE, [tensor], {"dims": (0, 2, 1)})


def _stack_halves(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    """`[e, gate; up, in]` as `[e, in, gate and up by turns]`; a bias without `in`."""
    count, half, rest = _by_halves(tensor, 1)
    apart = reshape(tensor, (count, 2, half, *rest))
    turned = apply(PERMUTE, [apart], {"dims": (0, 3, 2, 1) if rest else (0, 2, 1)})
    return {names[0]: reshape(turned, (count, *rest, 2 * half))}


def _halves_in_order(tensor: LazyTensor) -> LazyTensor:
    """What `_stack_halves` takes apart."""
    count, half, rest = _by_halves(tensor, -1)
    apart = reshape(tensor, (count, *rest, half, 2))
    turned = apply(PERMUTE, [apart], {"dims": (0, 3, 2, 1) if rest else (0, 2, 1)})
    return reshape(turned, (count, 2 * half, *rest))


def _by_halves(tensor: LazyTensor, dim: int) -> tuple[int, int, tuple[int, ...]]:
    """Experts, the size of gate or of up, which `dim` has twice, and the other dimension of a matrix."""
    shape = tensor.info.shape
    if len(shape) not in (2, 3) or shape[dim] % 2:
        raise SizeError(f"it is of the shape {list(shape)}, which is not a gate and up projection for each expert")
    return shape[0], shape[dim] // 2, (shape[2:] if dim == 1 else shape[1:-1])


def _of_each(
    inner: Callable[[tuple[str, ...], LazyTensor, Sizes], dict[str, LazyTensor]],
) -> Callable[[tuple[str, ...], LazyTensor, Sizes], dict[str, LazyTensor]]:
    """A formula of one expert for all, which are the first axis."""

    def of_all(names: tuple[str, ...], tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
        found: dict[str, LazyTensor] = {}
        for number in range(_rows(tensor)):
            one = reshape(narrow(tensor, 0, number, 1), tensor.info.shape[1:])
            found |= inner(tuple(n.replace("{E}", str(number)) for n in names), one, sizes)
        return found

    return of_all


def _rows(tensor: LazyTensor) -> int:
    if not tensor.info.shape:
        raise SizeError("it is a single number")
    return tensor.info.shape[0]


_FORMULAS: dict[Formula, Callable[[tuple[str, ...], LazyTensor, Sizes], dict[str, LazyTensor]]] = {
    "same": _same,
    "vocabulary": _vocabulary,
    "qkv": _qkv,
    "halves": _halves,
    "experts": _of_each(_same),
    "expert-halves": _of_each(_halves),
    "stack": _stack,
    "stack-halves": _stack_halves,
    "gated-qkv": _gated_qkv,
    "delta-projections": _delta_projections,
    "delta-channels": _delta_channels,
    "one-more": _one_more,
}
