"""DTensors of a file as they would be on another number of ranks: the tree that was read, with other pieces and places.

A DTensor is pickled as a call with the whole's shape, and the local tensor and its spec set on it; the spec refers to
the mesh of ranks, which knows how many there are and which one it is on. What torch computes from those and keeps (a
hash) is left for it to compute anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.core.formats.pickle_values import Built
from converter.core.formats.torch_tree import changed, saved
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor

WRAPPED = "torch._tensor._rebuild_from_type_v2"
_TYPE = "torch.distributed.tensor.DTensor"
_HASH = "_hash"
_RANKS = ("mesh", "_rank_map")
"""Tensors of all ranks: torch before 2.9 keeps the mesh, later ones the ranks in its order."""
_NAMES, _GROUPS = "_mesh_dim_names", "_dim_group_names"
"""What there is one of for each dimension."""
_LISTS = ("_flatten_mesh_list", "_flatten_rank_map")


class UnknownMesh(Exception):
    """A mesh that holds something that depends on the ranks in an unknown way, in words."""


def is_dtensor(value: Any) -> bool:
    """True for a DTensor of a tree."""
    is_call = isinstance(value, Built) and value.path == WRAPPED and len(value.args) == 4
    return is_call and getattr(value.args[1], "path", "").rpartition(".")[2] == _TYPE.rpartition(".")[2]


def part(whole: LazyTensor, dim: int, ranks: int, rank: int) -> LazyTensor:
    """A rank's piece, as `torch.chunk` cuts: unpadded, the last ones smaller or empty."""
    length = whole.info.shape[dim]
    step = -(-length // ranks)
    start = min(step * rank, length)
    count = min(step, length - start)
    if count == 0 or whole.info.numel == 0:
        return Filled(TensorInfo(whole.info.dtype, (*whole.info.shape[:dim], count, *whole.info.shape[dim + 1 :])), 0)
    return tensors.narrow(whole, dim, start, count)


@dataclass
class RankMesh:
    """Rewrites the DTensors of a file for one of several ranks. What was one object in the tree stays one.

    Attributes:
        sizes: of the mesh: the ranks, or replicas and the ranks of each.
    """

    sizes: tuple[int, ...]
    rank: int
    _made: dict[int, Built] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)

    @property
    def shards(self) -> int:
        """Pieces that a tensor is cut into."""
        return self.sizes[-1]

    @property
    def at(self) -> int:
        """Which of them the rank has."""
        return self.rank % self.shards

    def dtensor(self, value: Built, local: Built) -> Built:
        """A DTensor of the tree with another local tensor.

        Raises:
            UnknownMesh: what depends on the ranks is not all known.
        """
        function, kind, arguments, state = value.args
        fields = state[1] if isinstance(state, tuple) else state
        fields = changed(fields, _local_tensor=local, _spec=self._once(fields["_spec"], self._spec))
        state = (state[0], fields, *state[2:]) if isinstance(state, tuple) else fields
        return _copy(value, args=(function, kind, arguments, state))

    def _once(self, value: Any, make: Any) -> Built:
        if not isinstance(value, Built) or not isinstance(value.state, dict):
            raise UnknownMesh("a DTensor has no spec or no mesh")
        if id(value) not in self._made:
            self._kept.append(value)
            self._made[id(value)] = make(value)
        return self._made[id(value)]

    def _spec(self, value: Built) -> Built:
        fields: dict[str, Any] = {"mesh": self._once(value.state.get("mesh"), self._mesh)}
        placements = value.state.get("placements")
        if isinstance(placements, tuple | list) and len(placements) != len(self.sizes):
            # Of replicas of shards the shards are left, which are cut along the mesh's last dimension.
            fields["placements"] = type(placements)(placements[-1:])
            if value.state.get("shard_order"):
                fields["shard_order"] = tuple(map(self._first, value.state["shard_order"]))
        return _copy(value, state=_without_hash(value.state, fields))

    def _first(self, value: Any) -> Built:
        """Along which dimensions of the mesh a tensor's dimension is cut: the only one."""
        if not isinstance(value, Built) or len(value.args) != 2 or not isinstance(value.args[1], tuple):
            raise UnknownMesh("the order in which a tensor was cut is of a form that is not known")
        return _copy(value, args=(value.args[0], (0,)))

    def _mesh(self, value: Built) -> Built:
        state, fields = value.state, dict[str, Any]()
        tensors_of_ranks = [k for k in _RANKS if state.get(k) is not None]
        if not tensors_of_ranks or state.get("_root_mesh") is not None or state.get("_flatten_mapping"):
            raise UnknownMesh("the mesh of ranks is a part of another, or doesn't list its ranks")
        ranks = math.prod(self.sizes)
        numbers = tensors.concat([_integer(n) for n in range(ranks)], 0)
        shapes = {k: self.sizes if k == "mesh" else (ranks,) for k in tensors_of_ranks}
        fields |= {k: saved(tensors.reshape(numbers, shape)) for k, shape in shapes.items()}
        fields |= {k: (*range(ranks),) for k in _LISTS if k in state}
        for key in (_NAMES, _GROUPS):
            if isinstance(state.get(key), tuple | list) and len(state[key]) != len(self.sizes):
                fields[key] = type(state[key])(state[key][-1:])
        if "_layout" in state:
            fields["_layout"] = self._layout(state["_layout"])
        if "_rank" in state:
            fields["_rank"] = self.rank
        at = state.get("_coordinate_on_dim")
        place = (self.rank,) if len(self.sizes) == 1 else divmod(self.rank, self.shards)
        fields["_coordinate_on_dim"] = list(place) if isinstance(at, list) else place
        return _copy(value, state=_without_hash(state, fields))

    def _layout(self, value: Any) -> Built:
        """The mesh's sizes and strides, row by row."""
        state = value.state if isinstance(value, Built) and isinstance(value.state, dict) else {}
        axes = state.get("axes")
        if isinstance(axes, tuple) and len(axes) >= len(self.sizes):
            kept = axes[-len(self.sizes) :]
            if all(isinstance(a, Built) and isinstance(a.state, dict) and _is_axis(a.state) for a in kept):
                return _copy(value, state=changed(state, axes=tuple(map(self._axis, kept, self.sizes, self._strides))))
        if "shape" in state and state.keys() <= {"shape", "stride"}:
            return _copy(value, state=self._plain_sizes(state))
        raise UnknownMesh("the layout of the mesh is of a form that is not known")

    @property
    def _strides(self) -> tuple[int, ...]:
        return (*self.sizes[1:], 1)

    def _axis(self, axis: Built, size: int, stride: int) -> Built:
        # Newer versions leave out what has one rank.
        fields: dict[str, Any] = {"shape": (size,) if size > 1 else ()}
        fields |= {"stride": (stride,) if size > 1 else ()} if "stride" in axis.state else {}
        return _copy(axis, state=changed(axis.state, **fields))

    def _plain_sizes(self, state: Mapping[Any, Any]) -> Any:
        is_plain = not isinstance(state["shape"], tuple) and len(self.sizes) == 1
        fields = {"shape": self.sizes[0] if is_plain else self.sizes}
        return changed(state, **fields, **({"stride": 1 if is_plain else self._strides} if "stride" in state else {}))


def _is_axis(state: Mapping[Any, Any]) -> bool:
    return isinstance(state.get("shape"), tuple) and state.keys() <= {"shape", "stride"}


def _without_hash(state: Mapping[Any, Any], fields: Mapping[str, Any]) -> Any:
    return changed(state, **{**fields, **({_HASH: None} if _HASH in state else {})})


def _integer(number: int) -> LazyTensor:
    return Filled(TensorInfo(DType.I32, (1,)), number)


def _copy(value: Built, *, args: tuple[Any, ...] | None = None, state: Any = None) -> Built:
    made = Built(value.function, value.args if args is None else args, value.kwargs, is_new=value.is_new)
    made.state = value.state if state is None else state
    made.items, made.filled = value.items, value.filled
    return made
