"""A model whose tensors were split over ranks (tensor parallelism): AutoTP of DeepSpeed, or a trainer's own.

Each slice is saved as a run of its own, `mp_rank_01` beside `mp_rank_00`. How the slices of a tensor lie in the whole
is recorded by newer versions (`universal_checkpoint_info`: boxes, or patterns of names). Where it isn't, the whole's
shape that config.json implies says along which dimension they lie, where one only fits, and the layer is none whose
rows are several matrices laid one after the other.

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/checkpoint/affine.py (`AffinePiece`) and
`collect_autotp_universal_checkpoint_info` of deepspeed/module_inject/layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.files import slices_in
from converter.sources.deepspeed.state import Shards, read_shards
from converter.text import fold, show

INFO = "universal_checkpoint_info"
_FUSED = re.compile(r"qkv|query_key_value|c_attn|gate_up|w_pack|in_proj|dense_h_to_4h|Wqkv|fc1_1|swiglu", re.IGNORECASE)
"""Layers whose rows may be several matrices: a slice then has a part of each, and laying slices end to end is wrong."""
_MOST_PATTERNS = 100_000
Shape = tuple[int, ...]
Copy = tuple[str, LazyTensor, LazyTensor]
"""A tensor's name, what is taken of it, and another copy of that, which must be equal."""


@dataclass(frozen=True)
class Box:
    """A stretch of the whole along one dimension, and where it is.

    Attributes:
        start, length: in the whole.
        holders: slices that have it.
        at: where it begins in the slices.
    """

    start: int
    length: int
    holders: tuple[int, ...]
    at: int


@dataclass(frozen=True)
class Piece:
    """A block of elements as a run records it: offsets and strides in the whole and in the slice."""

    shape: Shape
    source: int
    source_strides: list[int]
    dest: int
    dest_strides: list[int]
    locations: tuple[int, ...]
    scale: float

    @classmethod
    def of(cls, value: Any, dims: int) -> Piece | None:
        """What a file says, or None where it is of another form."""
        if not isinstance(value, dict):
            return None
        shape, locations, scale = _shape(value.get("shape")), _shape(value.get("locations")), value.get("scale", 1.0)
        source, dest = _place(value.get("source"), dims), _place(value.get("dest"), dims)
        if shape is None or len(shape) != dims or not locations or source is None or dest is None:
            return None
        if not isinstance(scale, int | float) or 0 in shape:
            return None
        return cls(shape, *source, *dest, tuple(sorted(locations)), float(scale))


def _shape(value: Any) -> Shape | None:
    """Numbers of a list, none of them negative."""
    if not isinstance(value, list | tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
        return None
    return tuple(value)


def _place(value: Any, dims: int) -> tuple[int, list[int]] | None:
    """An offset, and as many strides as there are dimensions."""
    if not isinstance(value, list | tuple) or len(value) != 2 or _shape([value[0]]) is None:
        return None
    strides = _shape(value[1])
    return None if strides is None or len(strides) != dims else (value[0], list(strides))


def read_slices(first: Shards, code: str = "zero-tensor-parallel", kind: str = "tensor-parallel ranks") -> list[Shards]:
    """Every slice of a model, of which the first is read.

    Args:
        code: of the refusal where some are missing.
        kind: what they are.

    Raises:
        Refused: slices are missing or of other runs (`code`, `zero-mixed`).
    """
    folder, found = first.folder, slices_in(first.folder)
    claimed = first.model().get("mp_world_size")
    count = claimed if type(claimed) is int and 0 < claimed <= 10_000 else max(found) + 1
    if found != list(range(count)):
        lost = [f"mp_rank_{n:02d}" for n in range(count) if n not in found]
        extra = [f"mp_rank_{n:02d}" for n in found if n >= count]
        what = f"those of {fold(lost)} are missing" if lost else f"there are those of {fold(extra)} too, of another run"
        text = f"the model was split over {count} {kind}, and {what}"
        raise first.refuse(code, text, next="copy them from the nodes that wrote them")
    slices = [first, *(read_shards(folder, n, like=first) for n in range(1, count))]
    keys = ("global_steps", "dp_world_size", "mp_world_size")
    if (
        len({tuple(repr(s.model().get(k)) for k in keys) for s in slices}) > 1
        or len({(s.stage, s.ranks) for s in slices}) > 1
    ):
        raise first.refuse("zero-mixed", f"the files of {kind} are of different steps or runs")
    return slices


@dataclass(frozen=True)
class Joiner:
    """Puts slices together.

    Attributes:
        first: the first slice, for errors.
        count: how many slices there are.
        info: what the run recorded of how its tensors were split.
        implied: shapes of whole tensors by name, as config.json implies them.
    """

    first: Shards
    count: int
    info: Mapping[str, Any]
    implied: Mapping[str, Shape]

    def join(self, name: str, parts: Sequence[LazyTensor], *, is_copied: bool = False) -> tuple[LazyTensor, list[Copy]]:
        """The whole tensor, and further copies of it or of stretches of it that must be equal to those taken.

        Raises:
            Refused: how its slices lie in it is not recorded, or can't be inferred (`zero-tensor-parallel`).
        """
        if len({p.info.dtype for p in parts}) != 1 or len({len(p.info.shape) for p in parts}) != 1:
            raise self._refuse(name, "its slices are of different dtypes or ranks")
        if is_copied:
            return self._copies(name, parts)
        recorded = self._recorded(name)
        if recorded is not None:
            return self._by_boxes(name, parts, recorded)
        dim = self._dim_by_pattern(name, parts) if self.info else self._dim_by_shape(name, parts)
        if dim is None:
            return self._copies(name, parts)
        if any(_without(p.info.shape, dim) != _without(parts[0].info.shape, dim) for p in parts):
            raise self._refuse(name, f"its slices don't fit each other along dimension {dim}")
        return tensors.concat(list(parts), dim), []

    def _copies(self, name: str, parts: Sequence[LazyTensor]) -> tuple[LazyTensor, list[Copy]]:
        if len({p.info for p in parts}) != 1:
            raise self._refuse(name, "what should be copies has different shapes")
        return parts[0], [(name, parts[0], p) for p in parts[1:]]

    def _refuse(self, name: str, why: str) -> Exception:
        return self.first.refuse(
            "zero-tensor-parallel",
            f"{show(name)} was split over {self.count} tensor-parallel ranks: {why}",
            next="load it with DeepSpeed and save it gathered (engine.save_16bit_model)",
        )

    def _recorded(self, name: str) -> Mapping[Any, Any] | None:
        held = self.info.get("affine_map")
        maps = held.get("params") if isinstance(held, dict) else None
        if not isinstance(maps, dict) or len(maps) > _MOST_PATTERNS:
            return None
        if isinstance(held, dict) and held.get("version") != 1:
            raise self._refuse(name, f"how is recorded in a form that is not known ({show(held.get('version'))})")
        found: Any = maps.get(f"^{re.escape(name)}$")
        return found if isinstance(found, dict) else None

    def _by_boxes(
        self, name: str, parts: Sequence[LazyTensor], recorded: Mapping[Any, Any]
    ) -> tuple[LazyTensor, list[Copy]]:
        whole, ranks = _shape(recorded.get("logical_shape")), recorded.get("ranks")
        if whole is None or len(whole) != len(parts[0].info.shape) or not isinstance(ranks, dict):
            raise self._refuse(name, "what is recorded of it has another form")
        boxes: set[Box] = set()
        dims: set[int] = set()
        for number, part in enumerate(parts):
            own = ranks.get(number, ranks.get(str(number)))
            pieces = own.get("pieces") if isinstance(own, dict) else None
            if (
                not isinstance(own, dict)
                or not isinstance(pieces, list)
                or _shape(own.get("shard_shape")) != part.info.shape
            ):
                raise self._refuse(name, f"slice {number} is {list(part.info.shape)}, and not as is recorded")
            for value in pieces:
                piece = Piece.of(value, len(whole))
                if piece is None or any(h >= len(parts) for h in piece.locations):
                    raise self._refuse(name, "what is recorded of it has another form")
                dim, box = self._box(name, piece, whole, part.info.shape)
                boxes.add(box)
                dims |= set() if dim is None else {dim}
        if len(dims) > 1:
            raise self._refuse(name, "it was split along several dimensions")
        dim = next(iter(dims), 0)
        ordered = sorted(boxes, key=lambda b: b.start)
        at = 0
        for box in ordered:
            if box.start != at:
                raise self._refuse(name, "what is recorded of its slices leaves gaps or overlaps")
            at += box.length
        if at != (whole[dim] if whole else 1):
            raise self._refuse(name, "what is recorded of its slices is not all of it")
        taken: list[LazyTensor] = []
        copies: list[Copy] = []
        for box in ordered:
            held = [tensors.narrow(parts[h], dim, box.at, box.length) if whole else parts[h] for h in box.holders]
            taken.append(held[0])
            copies += [(name, held[0], other) for other in held[1:]]
        return tensors.concat(taken, dim) if whole else taken[0], copies

    def _box(self, name: str, piece: Piece, whole: Shape, part: Shape) -> tuple[int | None, Box]:
        """A piece as a stretch along one dimension, whole in all others."""
        if piece.scale != 1.0:
            raise self._refuse(name, f"its slices are kept multiplied by {piece.scale}")
        if piece.source_strides != _strides(whole) or piece.dest_strides != _strides(part):
            raise self._refuse(name, "its slices don't lie in it as boxes")
        begins, ends = _index(piece.source, whole), _index(piece.dest, part)
        split = [d for d in range(len(whole)) if piece.shape[d] != whole[d] or piece.shape[d] != part[d]]
        if len(split) > 1 or any(begins[d] or ends[d] for d in range(len(whole)) if d not in split):
            raise self._refuse(name, "it was split along several dimensions")
        if not whole:
            return None, Box(0, 1, piece.locations, 0)
        at = split[0] if split else 0
        if begins[at] + piece.shape[at] > whole[at] or ends[at] + piece.shape[at] > part[at]:
            raise self._refuse(name, "what is recorded of its slices is larger than they are")
        return split[0] if split else None, Box(begins[at], piece.shape[at], piece.locations, ends[at])

    def _dim_by_pattern(self, name: str, parts: Sequence[LazyTensor]) -> int | None:
        """The dimension by the patterns of names that a run recorded; None where every slice has the whole."""

        def listed(key: str) -> bool:
            patterns = self.info.get(key)
            names = patterns if isinstance(patterns, list) else []
            return any(isinstance(p, str) and _matches(p, name) for p in names)

        others = ("parameter_with_sub_params", "parameter_to_average_patterns", "parameter_with_2_sub_params_cat_dim_0")
        if any(self._mentions(self.info.get(k), name) for k in (*others, "autotp_unsupported_parameter_patterns")):
            raise self._refuse(name, "it is several matrices in one, or is averaged, which is not read")
        if listed("tp_replicated_parameter_patterns"):
            return None
        dim = 1 if listed("parameter_with_row_parallelism_patterns") else 0
        wanted = self.implied.get(name)
        if wanted is not None and _joined_shape(parts, dim) != wanted:
            return self._dim_by_shape(name, parts)
        return dim

    def _mentions(self, value: Any, name: str) -> bool:
        if isinstance(value, dict):
            return any(isinstance(p, str) and _matches(p, name) for p in value)
        if not isinstance(value, list):
            return False
        for entry in value:
            patterns = entry.get("patterns") if isinstance(entry, dict) else [entry]
            if any(isinstance(p, str) and _matches(p, name) for p in patterns or []):
                return True
        return False

    def _dim_by_shape(self, name: str, parts: Sequence[LazyTensor]) -> int | None:
        """The dimension by the shape that config.json implies; None where every slice has the whole."""
        wanted = self.implied.get(name)
        if wanted is None:
            text = "how is not recorded (`universal_checkpoint_info`), and config.json implies no shape of it"
            raise self._refuse(name, text if self.implied else f"{text}; there is no config.json beside the run")
        if all(p.info.shape == wanted for p in parts):
            return None
        fitting = [d for d in range(len(wanted)) if _joined_shape(parts, d) == wanted]
        if len(fitting) != 1:
            shapes = fold([str(list(p.info.shape)) for p in parts])
            raise self._refuse(name, f"slices {shapes} don't make {list(wanted)} in one way only")
        if fitting[0] == 0 and _FUSED.search(name):
            raise self._refuse(name, "its rows may be several matrices, and how they were split is not recorded")
        return fitting[0]


def _matches(pattern: str, name: str) -> bool:
    """True where a recorded pattern is for this name. Patterns come from a file: escaped names count, with digits."""
    plain = pattern.removeprefix("^").removesuffix("$")
    if re.fullmatch(r"(?:[\w.]|\\\.|\\d\+|\\-|\\_)+", plain) is None or len(plain) > 1000:
        return False
    return re.fullmatch(plain, name) is not None


def _strides(shape: Shape) -> list[int]:
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= size
    return found[::-1]


def _index(offset: int, shape: Shape) -> list[int]:
    """Coordinates of an element by its number."""
    found = []
    for stride in _strides(shape):
        found.append(offset // max(stride, 1))
        offset %= max(stride, 1)
    return found


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])


def _joined_shape(parts: Sequence[LazyTensor], dim: int) -> Shape | None:
    first = parts[0].info.shape
    if dim >= len(first) or any(_without(p.info.shape, dim) != _without(first, dim) for p in parts):
        return None
    return (*first[:dim], sum(p.info.shape[dim] for p in parts), *first[dim + 1 :])
