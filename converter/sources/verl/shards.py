"""Shards of FSDP as data: which stretch of a tensor each rank's DTensor is, and the whole made of them.

A DTensor is pickled as its local tensor, the whole's shape, a placement for each dimension of the mesh of ranks, and
the rank's own coordinate on that mesh. Pieces are cut as `torch.chunk` cuts: unpadded, the last ones smaller or empty.
On a mesh of replicas of shards (HSDP) one replica is the tensor.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import Identity
from converter.core.formats.torch_file import Opaque, read_torch_file
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor, Stored
from converter.errors import Refused
from converter.sources.own_names import OWN_NAMES, saved_as_another
from converter.sources.verl.files import RankFiles
from converter.text import show

_WRAPPER = "torch._utils._rebuild_wrapper_subclass"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank has of a tensor.

    Attributes:
        shape: the whole tensor's.
        dim: the dimension that was cut; None where this is the whole tensor.
        at: which piece along it.
        replica: which of the equal copies; empty where there is one.
        mesh: sizes of the mesh of ranks, where they are recorded.
    """

    shape: tuple[int, ...]
    local: LazyTensor
    dim: int | None
    at: int
    replica: tuple[int, ...]
    mesh: tuple[int, ...] | None
    cut_dim: int | None

    @property
    def pieces(self) -> int | None:
        """How many pieces the tensor was cut into, where that is recorded."""
        if self.dim is None:
            return 1
        return None if self.mesh is None or self.cut_dim is None else self.mesh[self.cut_dim]


Value = Piece | LazyTensor
"""A rank's piece, or a tensor that every rank has whole: a buffer, or all of them where one rank saved."""


@dataclass
class Ranks:
    """One part's files, opened as they are needed."""

    files: RankFiles
    said: list[str] = field(default_factory=list)
    checks: list[RecordCheck] = field(default_factory=list)
    inputs: dict[str, Identity] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _stored: dict[str, list[RecordCheck]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The part's folder."""
        return self.files.folder

    @property
    def digest(self) -> str:
        """sha256 over what the files opened so far say."""
        return hashlib.sha256(repr(sorted(self._digests.items())).encode()).hexdigest()

    def refuse(self, code: str, what: str, *, file: str | None = None, next: str | None = None) -> Refused:
        """A refusal about the folder or one of its files."""
        return Refused(code, what, where=show(self.folder / file if file else self.folder), next=next)

    def open(self, file: str) -> dict[Any, Any]:
        """The dictionary in a file. It is not kept: of hundreds of ranks only what their tensors are made of stays."""
        read = read_torch_file(self.folder / file, root=self.folder)
        if not isinstance(read.value, dict):
            raise self.refuse("verl-malformed", "the file holds no dictionary", file=file)
        if (what := saved_as_another(file, read.name)) is not None:
            raise self.refuse("verl-mixed", what, file=file, next=OWN_NAMES)
        path = str((self.folder / file).absolute())
        if file not in self._digests:
            self.checks += read.checks
        self._digests[file] = read.digest
        self.inputs[path] = read.identity
        self._stored[path] = sorted(read.checks, key=lambda c: c.offset)
        return read.value

    def value(self, saved: Any, file: str, name: str) -> Value | None:
        """A saved entry as a piece or a whole tensor; None where it is neither.

        Raises:
            Refused: placed in a way that is not read (`verl-placement`), or malformed (`verl-malformed`).
        """
        if isinstance(saved, LazyTensor):
            return saved
        if not isinstance(saved, Opaque) or saved.path != _WRAPPER:
            return None
        state = saved.state[1] if isinstance(saved.state, tuple) and len(saved.state) == 2 else saved.state
        local, spec = (state.get("_local_tensor"), state.get("_spec")) if isinstance(state, dict) else (None, None)
        shape = saved.args[2] if len(saved.args) > 2 else None
        mesh = spec.state.get("mesh") if isinstance(spec, Opaque) and isinstance(spec.state, dict) else None
        placements = spec.state.get("placements") if isinstance(spec, Opaque) and mesh is not None else None
        if (
            isinstance(local, LazyTensor)
            and isinstance(shape, tuple)
            and all(type(n) is int and n >= 0 for n in shape)
            and isinstance(placements, tuple | list)
            and isinstance(mesh, Opaque)
            and isinstance(mesh.state, dict)
        ):
            return self._piece(shape, local, list(placements), mesh.state, file, name)
        raise self.refuse("verl-malformed", f"{show(name)} is no DTensor that can be read", file=file)

    def _piece(
        self,
        shape: tuple[int, ...],
        local: LazyTensor,
        placements: list[Any],
        mesh: Mapping[Any, Any],
        file: str,
        name: str,
    ) -> Piece:
        at = mesh.get("_coordinate_on_dim")
        if not isinstance(at, tuple | list) or len(at) != len(placements) or not all(type(n) is int for n in at):
            what = f"{show(name)} does not record the rank's place on the mesh"
            raise self.refuse("verl-placement", what, file=file)
        dims = [_cut_dim(p) for p in placements]
        cut = [i for i, d in enumerate(dims) if d is not None]
        if any(d == -1 for d in dims) or len(cut) > 1 or (cut and not 0 <= (dims[cut[0]] or 0) < len(shape)):
            words = ", ".join(_placement_words(p) for p in placements)
            raise self.refuse(
                "verl-placement",
                f"{show(name)} is placed as ({show(words)}): tensors that are cut along several dimensions of the mesh "
                "(tensor parallel), or that hold partial sums, are not read",
                file=file,
                next="load the checkpoint with verl and save it with checkpoint.save_contents=[hf_model]",
            )
        replica = tuple(n for i, n in enumerate(at) if i not in cut)
        sizes = _mesh_sizes(mesh)
        if sizes is not None and len(sizes) != len(placements):
            sizes = None
        if not cut:
            return Piece(shape, local, None, 0, replica, sizes, None)
        return Piece(shape, local, dims[cut[0]], at[cut[0]], replica, sizes, cut[0])

    def whole(self, name: str, values: Mapping[int, Value], names: Mapping[int, str]) -> LazyTensor | None:
        """The tensor that the ranks' values make up; None where pieces are missing.

        Args:
            values: by rank.
            names: the ranks' files.

        Raises:
            Refused: values are not of one tensor (`verl-mixed`), pieces overlap or don't fit (`verl-sizes`).
        """
        pieces = {r: v for r, v in values.items() if isinstance(v, Piece)}
        plain = {r: v for r, v in values.items() if not isinstance(v, Piece)}
        if plain:
            if pieces:
                what = f"{show(name)} is whole in {show(names[min(plain)])} and a piece in {show(names[min(pieces)])}"
                raise self.refuse("verl-mixed", f"{what}: they are of two runs")
            return self._one_of(name, plain, names)
        first = pieces[min(pieces)]
        for rank, piece in pieces.items():
            if (piece.shape, piece.dim, piece.local.info.dtype) != (first.shape, first.dim, first.local.info.dtype):
                here, there = (f"{p.local.info.dtype.value} {list(p.shape)}" for p in (first, piece))
                what = f"{show(name)} is {here} in {show(names[min(pieces)])}, {there} in {show(names[rank])}"
                raise self.refuse("verl-mixed", f"{what}: they are of two runs")
        replicas: dict[tuple[int, ...], dict[int, int]] = {}
        for rank, piece in pieces.items():
            taken = replicas.setdefault(piece.replica, {})
            if piece.at in taken:
                what = f"{show(names[taken[piece.at]])} and {show(names[rank])} are of the same rank"
                raise self.refuse("verl-mixed", f"{what}: one of them was copied or renamed")
            taken[piece.at] = rank
        for _, taken in sorted(replicas.items()):
            found = self._joined(name, [pieces[taken[at]] for at in range(len(taken)) if at in taken], len(taken))
            if found is not None:
                return found
        return None

    def _joined(self, name: str, pieces: list[Piece], count: int) -> LazyTensor | None:
        """One replica's pieces in order, or None where some are missing."""
        if len(pieces) != count:
            return None
        first = pieces[0]
        info = TensorInfo(first.local.info.dtype, first.shape)
        if first.pieces is not None and count != first.pieces:
            return None
        if info.numel == 0:
            return Filled(info, 0)
        if first.dim is None:
            return self._fits(name, first.local, first.shape)
        parts = [p.local for p in pieces if p.local.info.numel]
        length = sum(p.info.shape[first.dim] for p in parts if len(p.info.shape) == len(first.shape))
        if length < first.shape[first.dim] and first.pieces is None:
            return None
        if length != first.shape[first.dim]:
            what = f"the pieces of {show(name)} have {length} rows together, the tensor {first.shape[first.dim]}"
            raise self.refuse("verl-sizes", what)
        rest = [(*p.info.shape[: first.dim], *p.info.shape[first.dim + 1 :]) for p in parts]
        if any(r != (*first.shape[: first.dim], *first.shape[first.dim + 1 :]) for r in rest):
            raise self.refuse("verl-sizes", f"the pieces of {show(name)} do not fit its shape {list(first.shape)}")
        return tensors.concat(parts, first.dim)

    def _fits(self, name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
        if tensor.info.shape != shape:
            raise self.refuse("verl-sizes", f"{show(name)} is {list(tensor.info.shape)}, and said to be {list(shape)}")
        return tensor

    def _one_of(self, name: str, copies: Mapping[int, LazyTensor], names: Mapping[int, str]) -> LazyTensor:
        """A tensor that every rank has whole: the copies must be equal, as the containers' checksums tell."""
        first = min(copies)
        for rank, copy in copies.items():
            if copy.info != copies[first].info or self._print(copy) != self._print(copies[first]):
                what = (
                    f"{show(name)} is not a shard but a whole tensor, and differs between {show(names[first])} and "
                    f"{show(names[rank])}"
                )
                raise self.refuse("verl-mixed", f"{what}: they are of two runs, or of two steps")
        return copies[first]

    def is_same(self, one: Value | None, other: Value | None) -> bool:
        """True where two ranks' pieces or tensors hold the same bits, as the containers' checksums tell."""
        first, second = (v.local if isinstance(v, Piece) else v for v in (one, other))
        if first is None or second is None:
            return first is second
        return first.info == second.info and self._print(first) == self._print(second)

    def _print(self, tensor: LazyTensor) -> object:
        """What tells the content of two stored tensors apart: their storages' checksums and where they lie in them."""
        if not isinstance(tensor, Stored) or not tensor.info.numel:
            return None
        stored = self._stored.get(tensor.file, [])
        at = bisect.bisect_right(stored, tensor.offset, key=lambda c: c.offset) - 1
        return (stored[at].crc, tensor.offset - stored[at].offset) if at >= 0 else None


def _cut_dim(placement: Any) -> int | None:
    """The dimension that a placement cuts; None: not cut; -1: neither."""
    path = placement.path if isinstance(placement, Opaque) else ""
    kind = path.rpartition(".")[2]
    if ".placement_types." not in path or kind not in ("Shard", "Replicate"):
        return -1
    if kind == "Replicate":
        return None
    dim = placement.state.get("dim") if isinstance(placement.state, dict) else None
    return dim if type(dim) is int and dim >= 0 else -1


def _placement_words(placement: Any) -> str:
    kind = placement.path.rpartition(".")[2] if isinstance(placement, Opaque) else "unknown"
    dim = placement.state.get("dim") if isinstance(placement, Opaque) and isinstance(placement.state, dict) else None
    return kind if dim is None else f"{kind}({dim})"


def _mesh_sizes(mesh: Mapping[Any, Any]) -> tuple[int, ...] | None:
    """Sizes of a mesh: of its tensor of ranks (torch before 2.9), or of its layout."""
    ranks = mesh.get("mesh")
    if isinstance(ranks, LazyTensor):
        return ranks.info.shape
    layout = mesh.get("_layout")
    state = layout.state if isinstance(layout, Opaque) and isinstance(layout.state, dict) else {}
    axes = state.get("axes", state.get("shape"))
    if not isinstance(axes, tuple):
        return None
    sizes: list[int] = []
    for axis in axes:
        shape = axis.state.get("shape") if isinstance(axis, Opaque) and isinstance(axis.state, dict) else (axis,)
        if not isinstance(shape, tuple) or not all(type(n) is int and n > 0 for n in shape):
            return None
        sizes.append(math.prod(shape))
    return tuple(sizes)
