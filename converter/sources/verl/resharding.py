"""A part of a verl run for another number of ranks: model, optimizer and extra files, cut as FSDP cuts them.

Under FSDP2, and for the weights of both, a rank has the rows of each tensor that `torch.chunk` gives it. The optimizer
of FSDP1 has a stretch of all parameters of a wrapped module, laid end to end. A random state is one rank's: ranks that
were not there before begin with the one that their trainer seeds.

Source: https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/checkpoint/fsdp_checkpoint_manager.py,
`_get_shard` in https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_flat_param.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.core.checkpoint import RecordCheck, SideFile
from converter.core.files.opening import Identity
from converter.core.files.strict_json import load_json
from converter.core.formats.pickle_values import Built
from converter.core.formats.torch_container import Container, read_container
from converter.core.formats.torch_file import read_torch_file
from converter.core.formats.torch_tree import changed, saved
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.torch_trees import lay_out_any, lay_out_tree
from converter.sources.own_names import OWN_NAMES, saved_as_another
from converter.sources.verl.agreement import expect_one_schedule, expect_same_groups, extra_files
from converter.sources.verl.files import FSDP_CONFIG, rank_files
from converter.sources.verl.meshes import RankMesh, UnknownMesh, is_dtensor, part
from converter.sources.verl.moments import parameters, wrapped_units
from converter.sources.verl.shards import Piece, Ranks, Value
from converter.sources.verl.weights import Weights, read_weights
from converter.text import fold, show

RNG = "rng"


@dataclass(frozen=True)
class Part:
    """The files of one part for other ranks.

    Attributes:
        shards: files with tensors.
        files: others, by name.
        said: what was found or left behind.
    """

    world: int
    shards: tuple[ShardPlan, ...]
    files: Mapping[str, SideFile]
    inputs: Mapping[str, Identity]
    checks: tuple[RecordCheck, ...]
    digest: str
    said: tuple[str, ...]


def reshard_part(folder: Path, place: str, ranks: int, *, tied: bool) -> Part:
    """Every rank's files of the part in `folder`, for `ranks` ranks, in the folder `place` of the output.

    Raises:
        Refused: files missing or mixed; a mesh of several dimensions, or one that can't be rewritten (`verl-mesh`); an
            optimizer's state that can't be cut anew (`verl-optimizer`).
    """
    read = Ranks(rank_files(folder))
    made = Resharding(read, read_weights(read), ranks, place, tied)
    if missing := read.files.missing(read.files.models):
        raise read.refuse("verl-rank-missing", f"model files of ranks {fold(list(map(str, missing)))} are missing")
    shards = [*made.models()]
    if read.files.optimizers:
        shards += made.optimizers()
    else:
        read.said.append("no optimizer was saved with it: its state begins anew")
    more, files = made.extra()
    said = (*read.files.said, *read.said)
    return Part(read.files.world, (*shards, *more), files, read.inputs, tuple(read.checks), read.digest, said)


@dataclass(frozen=True)
class Resharding:
    """The files of one part on another number of ranks.

    Attributes:
        place: the folder of the output that they go to.
        names: what a rank's file is called, for `model` and `optim`, where it isn't called as verl does.
    """

    read: Ranks
    weights: Weights
    ranks: int
    place: str
    tied: bool
    names: Mapping[str, str] = field(default_factory=dict)

    def _file(self, kind: str, rank: int) -> str:
        name = self.names.get(kind, f"{kind}_world_size_{self.ranks}_rank_{{rank}}.pt").format(rank=rank)
        return f"{self.place}/{name}" if self.place else name

    def _dtensor(self, mesh: RankMesh, value: Built, local: Built, file: str) -> Built:
        try:
            return mesh.dtensor(value, local)
        except UnknownMesh as why:
            what, advice = f"DTensors can't be cut for others: {why}", "resume on as many ranks, or gather the weights"
            raise self.read.refuse("verl-mesh", what, file=file, next=advice) from None

    def _one_dimension(self, name: str, piece: Piece, file: str) -> int | None:
        """The dimension that a piece was cut along; None where every rank has all of it.

        Raises:
            Refused: cut along another than the mesh's last dimension, or over a mesh that isn't known (`verl-mesh`).
        """
        sizes = piece.mesh or ()
        if len(sizes) not in (1, 2) or piece.cut_dim not in (None, len(sizes) - 1):
            words = "x".join(map(str, sizes)) or "an unknown number of"
            what = f"{show(name)} lies on a mesh of {words} ranks, and not cut along the last of its dimensions"
            advice = "resume on as many ranks as before, or gather the weights"
            raise self.read.refuse("verl-mesh", what, file=file, next=advice)
        return piece.dim

    def _sizes(self) -> tuple[int, ...]:
        """The mesh of the new ranks: as many shards a replica as before, where there are more ranks than those.

        That is what verl makes of `fsdp_size`.

        Raises:
            Refused: the ranks don't make whole replicas (`verl-mesh`).
        """
        first = self.read.files.models[min(self.read.files.models)]
        values = (self.read.value(v, first, show(str(n))) for n, v in self.read.open(first).items())
        before = next((v.mesh for v in values if isinstance(v, Piece) and v.mesh), ())
        if len(before) != 2 or self.ranks <= before[1]:
            return (self.ranks,)
        if self.ranks % before[1]:
            what = f"{self.ranks} ranks don't make replicas of {before[1]} shards (fsdp_size), as the run had them"
            advice = f"take a multiple of {before[1]}, or up to {before[1]} ranks, which are one replica"
            raise self.read.refuse("verl-mesh", what, next=advice)
        return (self.ranks // before[1], before[1])

    # Weights

    def models(self) -> list[ShardPlan]:
        """A model file a rank."""
        read, first = self.read, self.read.files.models[min(self.read.files.models)]
        source = self._container(first)
        state, pieces = source.pickle.value, read.open(first)
        held = {n: read.value(v, first, n) for n, v in pieces.items()}
        if read.files.world == 1 and not any(isinstance(v, Piece) for v in held.values()) and self.ranks > 1:
            what = "one rank saved whole tensors, without the DTensors that several ranks load"
            raise read.refuse("verl-mesh", what, file=first, next="gather the weights: all ranks begin there")
        made = []
        is_plain = self.ranks == 1 and self._is_fsdp_1()
        sizes = self._sizes()
        for rank in range(self.ranks):
            mesh = None if is_plain else RankMesh(sizes, rank)
            locals_: dict[str, Built] = {}
            values = {n: self._weight(n, v, held[n], mesh, locals_, first) for n, v in state.items()}
            made.append(lay_out_tree(self._file("model", rank), changed(state, **values), source))
        return made

    def _weight(
        self, name: str, value: Any, held: Value | None, mesh: RankMesh | None, locals_: dict[str, Built], file: str
    ) -> Any:
        """An entry of a rank's model; names that share a storage share it again. Without a mesh: whole tensors."""
        if not isinstance(held, Piece):
            whole = self.weights.tensors.get(name)
            if isinstance(held, LazyTensor) and whole is not None and whole.info != held.info:
                what = f"{show(name)} is in plain rows and not in DTensors: which trainer loads them is not known"
                raise self.read.refuse("verl-mesh", what, file=file)
            return value
        dim = self._one_dimension(name, held, file)
        first = next((group[0] for group in self.weights.shared if name in group), name)
        if first not in locals_:
            whole = self.weights.tensors[name]
            locals_[first] = saved(whole if dim is None or mesh is None else part(whole, dim, mesh.shards, mesh.at))
        return locals_[first] if mesh is None else self._dtensor(mesh, value, locals_[first], file)

    def _is_fsdp_1(self) -> bool:
        """True where FSDP1 saved, which has plain tensors where it is one rank alone.

        Raises:
            Refused: nothing tells which FSDP it was (`verl-mesh`).
        """
        files = self.read.files
        config = self.read.folder / FSDP_CONFIG
        if (
            config.is_file()
            and isinstance(version := load_json(config), dict)
            and version.get("FSDP_version") in (1, 2)
        ):
            return bool(version["FSDP_version"] == 1)
        if files.optimizers:
            entries = self._entries(next(iter(files.optimizers.values())))
            return any(_is_flat(own) for own in entries.values())
        what = f"without {FSDP_CONFIG} and optimizer nothing tells whether one rank alone expects DTensors"
        raise self.read.refuse("verl-mesh", what, next="gather the weights: all ranks begin there")

    # The optimizer

    def optimizers(self) -> list[ShardPlan]:
        """An optimizer file a rank."""
        files = self.read.files
        order = self.weights.order if len(self.weights.order) > 1 or files.world == 1 else range(files.world)
        if lost := [r for r in order if r not in files.optimizers]:
            what = (
                f"optimizer files of ranks {fold(list(map(str, lost)))} are missing, each with a part of every moment"
            )
            raise self.read.refuse("verl-rank-missing", what, next="copy them from the nodes that wrote them")
        first = files.optimizers[order[0]]
        source = self._container(first)
        tree = source.pickle.value
        entries = {r: self._entries(files.optimizers[r]) for r in order}
        expect_same_groups(self.read, order)
        groups = tree.get("param_groups")
        listed = [g.get("params") for g in groups if isinstance(g, dict)] if isinstance(groups, list) else []
        params = [p for p in listed if isinstance(p, list)]
        if not params or len(params) != len(listed):
            raise self.read.refuse("verl-optimizer", "this is not the state of groups of parameters", file=first)
        totals = self._totals(entries, len(params[0]) if len(params) == 1 else None)
        made = []
        sizes = self._sizes()
        for rank in range(self.ranks):
            mesh = RankMesh(sizes, rank)
            state = {
                n: {k: self._state(n, k, v, entries, totals, mesh) for k, v in own.items()}
                for n, own in tree["state"].items()
            }
            made.append(lay_out_tree(self._file("optim", rank), changed(tree, state=state), source))
        return made

    def _entries(self, file: str) -> dict[Any, dict[str, Value]]:
        """An optimizer file's tensors: by the parameter's number, by the state's name."""
        found: dict[Any, dict[str, Value]] = {}
        state = self.read.open(file).get("state")
        if not isinstance(state, dict) or not all(isinstance(own, dict) for own in state.values()):
            raise self.read.refuse("verl-optimizer", "there is no state by numbers of parameters", file=file)
        for number, own in state.items():
            values = {k: self.read.value(v, file, f"{k} {number}") for k, v in own.items()}
            found[number] = {k: v for k, v in values.items() if v is not None}
        return found

    def _totals(self, entries: Mapping[int, Mapping[Any, Mapping[str, Value]]], count: int | None) -> Mapping[Any, int]:
        """Elements of each wrapped module of FSDP1; empty under FSDP2."""
        if len({tuple((n, tuple(own)) for n, own in e.items()) for e in entries.values()}) > 1:
            what = "the ranks' optimizers have states of different parameters, as FSDP1 has with use_orig_params"
            raise self._no_state(what)
        flat = {n for own in entries.values() for n, v in own.items() if _is_flat(v)}
        if not flat:
            return {}
        if count is None:
            raise self._no_state("flat parameters lie in several groups")
        names = parameters(self.weights, self.tied)
        held = {r: {n: next(x for x in v.values() if _is_long(x)) for n, v in e.items()} for r, e in entries.items()}
        units = wrapped_units(self.weights, names, held, count)
        if units is None:
            raise self._no_state(f"it numbers {count} parameters, and no wrapping of the model gives their lengths")
        return {n: sum(self.weights.tensors[name].info.numel for name in unit) for n, unit in units.items()}

    def _state(
        self,
        number: Any,
        key: str,
        value: Any,
        entries: Mapping[int, Mapping[Any, Mapping[str, Value]]],
        totals: Mapping[Any, int],
        mesh: RankMesh,
    ) -> Any:
        """A state of a parameter on a rank: one number for all, or its piece."""
        files = self.read.files.optimizers
        parts = {r: e[number][key] for r, e in entries.items() if key in e[number]}
        if not parts:
            return value
        name = f"{key} of parameter {number}"
        first, file = next(iter(parts.values())), files[next(iter(parts))]
        if isinstance(first, Piece):
            whole = self.read.whole(name, parts, files)
            dim = self._one_dimension(name, first, file)
            if whole is None or not is_dtensor(value):
                raise self._no_state(f"{show(name)} is not whole in the ranks' files")
            local = saved(whole if dim is None else part(whole, dim, mesh.shards, mesh.at))
            return self._dtensor(mesh, value, local, file)
        if not _is_long(first):
            same = self.read.whole(name, parts, files)
            return value if same is None else saved(same)
        total, share = totals.get(number), {p.info for p in parts.values() if isinstance(p, LazyTensor)}
        if total is None or share != {TensorInfo(first.info.dtype, (-(-total // len(parts)),))}:
            raise self._no_state(f"{show(name)} is {list(first.info.shape)} on a rank")
        stretches = [p for p in parts.values() if isinstance(p, LazyTensor)]
        return saved(_stretch(stretches, total, mesh.shards, mesh.at))

    def _no_state(self, what: str) -> Exception:
        return self.read.refuse(
            "verl-optimizer",
            f"the optimizer's state can't be cut for other ranks: {what}",
            file=next(iter(self.read.files.optimizers.values())),
            next="resume on as many ranks as before; or gather the weights and begin the optimizer anew",
        )

    # The rest

    def extra(self) -> tuple[list[ShardPlan], dict[str, SideFile]]:
        """Schedules and random states: a rank's own where it was there before, else without a random state."""
        names = extra_files(self.read.files)
        if 0 not in names:
            return [], {}
        expect_one_schedule(self.read)
        shards: list[ShardPlan] = []
        files: dict[str, SideFile] = {}
        for rank in range(self.ranks):
            source = self._container(names.get(rank, names[0]))
            tree = source.pickle.value
            read_torch_file(source.path, root=self.read.folder)  # what loads it unpickles it
            if rank not in names and isinstance(tree, dict):
                tree = {k: v for k, v in tree.items() if k != RNG}
            file = self._file("extra_state", rank)
            made = lay_out_any(file, tree, source)
            if isinstance(made, ShardPlan):
                shards.append(made)
            else:
                files[file] = SideFile(content=made)
        self._say_random(sorted(names))
        return shards, files

    def _say_random(self, before: Sequence[int]) -> None:
        fresh = [str(r) for r in range(self.ranks) if r not in before]
        left = [str(r) for r in before if r >= self.ranks]
        if fresh:
            self.read.said.append(f"random states belong to a rank: ranks {fold(fresh)} begin with the trainer's seed")
        if left:
            self.read.said.append(f"random states belong to a rank: those of ranks {fold(left)} are left behind")

    def _container(self, file: str) -> Container:
        found = read_container(self.read.folder / file, root=self.read.folder)
        if (what := saved_as_another(file, found.name)) is not None:
            raise self.read.refuse("verl-mixed", what, file=file, next=OWN_NAMES)
        self.read.inputs[str((self.read.folder / file).absolute())] = found.identity
        return found


def _is_long(value: Value) -> bool:
    return isinstance(value, LazyTensor) and len(value.info.shape) > 0


def _is_flat(own: Mapping[str, Value]) -> bool:
    """True for states of one rank that are not DTensors."""
    return any(_is_long(v) for v in own.values())


def _stretch(parts: Sequence[LazyTensor], total: int, ranks: int, rank: int) -> LazyTensor:
    """A rank's stretch of a wrapped module's parameters, padded with zeros to the length that all have."""
    flat = tensors.narrow(tensors.concat(parts, 0), 0, 0, total)
    share = -(-total // ranks)
    start = min(share * rank, total)
    count = min(share, total - start)
    found = [tensors.narrow(flat, 0, start, count)] if count else []
    padding = [Filled(TensorInfo(flat.info.dtype, (share - count,)), 0)] if count < share else []
    return tensors.concat([*found, *padding], 0)
