"""What DeepSpeed's rank files say, checked against one another: are they one checkpoint, and is all of it here?"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import Identity, open_input, read_exact
from converter.core.formats.torch_container import Container
from converter.core.formats.torch_file import Opaque, TorchFile, read_numbers, read_torch_file, read_tree
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor, Stored
from converter.errors import Refused
from converter.sources.deepspeed.files import UNIVERSAL, RankFiles, holds_experts, is_universal, rank_files
from converter.sources.own_names import OWN_NAMES, saved_as_another
from converter.sources.same_settings import other_setting
from converter.sources.survey import file_names
from converter.text import fold, show

BF16_OPTIMIZER = "BF16_Optimizer"


@dataclass
class Shards:
    """One tag's files, opened as they are needed.

    Attributes:
        stage: 0 to 3.
        ranks: data-parallel ranks that saved; 1 where no file says.
        optimizer: `BF16_Optimizer`, or empty.
        universal: ds_to_universal.py made it: masters and moments lie in one folder a parameter.
        experts: experts were spread over the ranks, and their weights lie in a file each.
        agreed: that the optimizer files are of the model file's save was looked into.
        said: what was found that a user should know.
    """

    files: RankFiles
    stage: int = 0
    ranks: int = 1
    optimizer: str = ""
    universal: bool = False
    experts: bool = False
    agreed: bool = False
    said: list[str] = field(default_factory=list)
    checks: list[RecordCheck] = field(default_factory=list)
    inputs: dict[str, Identity] = field(default_factory=dict)
    _opened: dict[str, Any] = field(default_factory=dict)
    _trees: dict[str, Container] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The tag's folder."""
        return self.files.folder

    @property
    def digest(self) -> str:
        """sha256 over what the files opened so far say."""
        text = repr(sorted(self._digests.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def names(self) -> list[str]:
        """Names of the files of all ranks, and of what else was read."""
        own = [self.files.whole, *self.files.models.values(), *self.files.optimizers.values()]
        return list(dict.fromkeys([n for n in own if n is not None] + list(self._opened)))

    def refuse(self, code: str, what: str, *, file: str | None = None, next: str | None = None) -> Refused:
        """A refusal about the folder or one of its files."""
        return Refused(code, what, where=show(self.folder / file if file else self.folder), next=next)

    def read(self, file: str) -> Any:
        """What a file holds."""
        if file not in self._opened:
            self._opened[file] = self._noted(file, read_torch_file(self.folder / file, root=self.folder))
        return self._opened[file]

    def _noted(self, file: str, read: TorchFile) -> Any:
        if (what := saved_as_another(file, read.name)) is not None:
            raise self.refuse("zero-mixed", what, file=file, next=OWN_NAMES)
        self.checks += read.checks
        self.inputs[str((self.folder / file).absolute())] = read.identity
        self._digests[file] = read.digest
        return read.value

    def numbers(self, rank: int) -> Mapping[Any, Any]:
        """Numbers and texts in a rank's model file, whose tensors nobody needs."""
        file = self.files.models[rank]
        if file in self._opened:
            return self.open(file)
        return cast("dict[Any, Any]", self._noted(file, read_numbers(self.folder / file, root=self.folder)))

    def tree(self, file: str) -> Container:
        """What a file's pickle says, for those who write it again; the dictionary in it is sure to be one."""
        if file not in self._trees:
            self.open(file)
            found = read_tree(self.folder / file, root=self.folder)
            if not isinstance(found.pickle.value, dict):
                raise self.refuse("zero-malformed", "the file holds no plain dictionary", file=file)
            self._trees[file] = found
        return self._trees[file]

    def open(self, file: str) -> Mapping[Any, Any]:
        """The dictionary in a file."""
        value = self.read(file)
        if not isinstance(value, dict):
            raise self.refuse("zero-malformed", "the file holds no dictionary", file=file)
        return value

    def model(self, rank: int = 0) -> Mapping[Any, Any]:
        """The model file's dictionary, that of `rank` in stage 3."""
        return self.open(self.files.whole or self.files.models[rank])

    def model_file(self, rank: int = 0) -> str:
        """The name of that file."""
        return self.files.whole or self.files.models[rank]

    def optim(self, rank: int) -> Mapping[Any, Any]:
        """The state in an optimizer file."""
        file = self.files.optimizers[rank]
        outer = self.open(file)
        state = outer.get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise self.refuse("zero-malformed", "the file has no optimizer_state_dict", file=file)
        return state

    def missing(self) -> list[int]:
        """Ranks whose optimizer file isn't there."""
        return [r for r in range(self.ranks) if r not in self.files.optimizers]


def read_shards(folder: Path, slice: int = 0, like: Shards | None = None) -> Shards:
    """The tag's files, checked as far as their names and the first of them go.

    Args:
        slice: see `rank_files`.
        like: those of another slice, which keeps what is read of both.

    Raises:
        Refused: files that are not of one checkpoint (`zero-mixed`), or without which nothing can be read
            (`zero-rank-missing`, `zero-model-file`).
    """
    files = rank_files(folder, slice)
    shards = Shards(files) if like is None else dataclasses.replace(like, files=files, optimizer="", agreed=False)
    if files.whole is None and not files.models:
        raise shards.refuse(
            "zero-model-file",
            "there is no *model_states.pt: names and shapes are in it, so the partitions can't be read without it",
            next="copy it from the first node of the run",
        )
    first = shards.model(min(files.models, default=0))
    if is_universal(folder):
        _read_universal(shards, first)
        return shards
    shards.experts = holds_experts(file_names(folder)) or bool(first.get("ds_autoep_layers"))
    shards.stage = _stage(shards, first)
    shards.ranks = _ranks(shards, first)
    stale = [n for found in (files.models, files.optimizers) for r, n in found.items() if r >= shards.ranks]
    if stale:
        shards.said.append(f"left over from a run with more than {shards.ranks} ranks, not read: {fold(stale)}")
        own = ({r: n for r, n in found.items() if r < shards.ranks} for found in (files.models, files.optimizers))
        shards.files = RankFiles(files.folder, files.whole, *own)
    if shards.stage == 3:
        _expect_rank_files(shards)
    return shards


def common_state(shards: Shards) -> Mapping[Any, Any]:
    """What a universal checkpoint keeps of the optimizer beside its parameters; empty where it has no such file."""
    name = f"{UNIVERSAL}/optimizer_state.pt"
    return shards.open(name) if (shards.folder / name).is_file() else {}


def _read_universal(shards: Shards, first: Mapping[Any, Any]) -> None:
    """Stage and ranks of the run that a universal checkpoint was made from."""
    common = common_state(shards)
    shards.universal = True
    stage = _stage_number(common.get("zero_stage"))
    if common and stage is None:
        shards.optimizer = BF16_OPTIMIZER
    shards.stage = 3 if shards.files.models else stage or 1
    if stage not in (None, shards.stage):
        text = f"the parameters are from stage {show(stage)}, the model files are not: they are of two runs"
        raise shards.refuse("zero-mixed", text)
    claimed, counts = first.get("dp_world_size"), common.get("partition_count")
    counted = counts if isinstance(counts, list) else [counts]
    known = {n for n in (*counted, claimed) if type(n) is int and n > 0}
    if len(known) > 1:
        raise shards.refuse("zero-mixed", f"model files and parameters are from runs of {sorted(known)} ranks")
    shards.ranks = known.pop() if known else max(shards.files.models, default=0) + 1
    if shards.stage == 3:
        expect_model_files(shards)


def _stage_number(value: Any) -> Any:
    return value.args[0] if isinstance(value, Opaque) and value.args else value


def _stage(shards: Shards, first: Mapping[Any, Any]) -> int:
    if shards.files.models:
        return 3
    if not shards.files.optimizers:
        return 0 if first.get("param_shapes") is None else 1
    state = shards.optim(min(shards.files.optimizers))
    value = state.get("zero_stage")
    if value is None:
        shards.optimizer = BF16_OPTIMIZER
        return 1
    number = _stage_number(value)
    if number not in (0, 1, 2):
        raise shards.refuse("zero-mixed", f"the optimizer files are of stage {show(number)}, the model file is not")
    return int(number)


def _ranks(shards: Shards, first: Mapping[Any, Any]) -> int:
    """The number of ranks, as the model file says and the optimizer files agree."""
    claimed = first.get("dp_world_size")
    counted = _partitions(shards) if shards.files.optimizers else None
    known = [n for n in (counted, claimed) if type(n) is int and n > 0]
    if not known:
        return max([*shards.files.optimizers, *shards.files.models], default=0) + 1
    if counted is not None and type(claimed) is int and claimed != counted:
        raise shards.refuse(
            "zero-mixed",
            f"the model file is from {show(claimed)} ranks, the optimizer files from {counted}: they are of two runs",
        )
    return int(known[0])


def _partitions(shards: Shards) -> int | None:
    state = shards.optim(min(shards.files.optimizers))
    value = state.get("partition_count")
    counts = {n if type(n) is int else None for n in (value if isinstance(value, list) else [value])}
    if len(counts) != 1 and (not shards.experts or None in counts):
        text = "parameter groups were partitioned over different numbers of ranks, and there are no files of experts"
        raise shards.refuse("zero-experts", text)
    count = max((n for n in counts if n is not None), default=None)
    return count if type(count) is int and count > 0 else None


def _expect_rank_files(shards: Shards) -> None:
    """Stage 3: all ranks' files, since each has a piece of every parameter."""
    lost = shards.missing()
    if lost:
        raise shards.refuse(
            "zero-rank-missing",
            f"optimizer files of rank {_numbers(lost)} of {shards.ranks} are missing: with each, 1/{shards.ranks} of "
            "every trained parameter is lost",
            next="copy them from the nodes that wrote them; nothing else holds these values",
        )
    expect_model_files(shards)


def expect_model_files(shards: Shards) -> None:
    """Stage 3: that of rank 0, and all ranks' where parameters were frozen, since each has a piece of them.

    Raises:
        Refused: one is missing (`zero-rank-missing`).
    """
    lost = [r for r in range(shards.ranks) if r not in shards.files.models]
    if 0 in lost or (lost and _mapping(shards.model(min(shards.files.models)).get("frozen_param_shapes"))):
        raise shards.refuse(
            "zero-rank-missing",
            f"model files of rank {_numbers(lost)} of {shards.ranks} are missing: with each, 1/{shards.ranks} of every "
            "frozen parameter is lost, and with that of rank 0 the list of shared ones",
            next="copy them from the nodes that wrote them",
        )
    if lost:
        shards.said.append(f"model files of rank {_numbers(lost)} are missing; nothing in them is needed")


def _numbers(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, list(ranks)[:16]))


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def all_optimizers(shards: Shards) -> list[Mapping[Any, Any]]:
    """Every rank's optimizer state, in the order of ranks, checked to be of one run and one step.

    Raises:
        Refused: files are missing (`zero-rank-missing`) or are not of one checkpoint (`zero-mixed`).
    """
    if not shards.files.optimizers:
        raise shards.refuse("zero-no-masters", "there are no optimizer files: no fp32 masters, no moments")
    if lost := shards.missing():
        raise shards.refuse(
            "zero-rank-missing",
            f"optimizer files of rank {_numbers(lost)} of {shards.ranks} are missing: with each, a stretch of the fp32 "
            "masters and moments is lost",
            next="without --master and with the training dtype the weights are whole: they are in "
            f"{show(shards.files.whole)}"
            if shards.files.whole
            else None,
        )
    states = [shards.optim(r) for r in range(shards.ranks)]
    for rank, state in enumerate(states):
        counts = state.get("partition_count")
        if counts != states[0].get("partition_count"):
            raise shards.refuse(
                "zero-mixed",
                f"rank {rank} is of a run with {show(counts)} partitions, rank 0 of one with "
                f"{show(states[0].get('partition_count'))}",
                file=shards.files.optimizers[rank],
            )
    steps = {rank: step_of(shards, state) for rank, state in enumerate(states)}
    known = {rank: step for rank, step in steps.items() if step is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"rank {r}: step {s:g}" for r, s in list(known.items())[:8])
        raise shards.refuse("zero-mixed", f"the optimizer files are of different steps ({listed})")
    if (what := other_setting({r: _mapping(_base(s)).get("param_groups") for r, s in enumerate(states)})) is not None:
        raise shards.refuse("zero-mixed", f"the optimizer files are not of one save: {what}")
    return states


def expect_one_step(shards: Shards, ranks: Iterable[int]) -> None:
    """Model files of stage 3 must be of one step.

    Raises:
        Refused: they aren't (`zero-mixed`).
    """
    has_more = bool(shards.model(min(shards.files.models)).get("frozen_param_shapes"))
    held = {r: shards.model(r) if has_more else shards.numbers(r) for r in ranks}
    steps = {r: (own.get("global_steps"), own.get("dp_world_size")) for r, own in held.items()}
    if len(set(map(repr, steps.values()))) > 1:
        listed = ", ".join(f"rank {r}: step {show(s)} of {show(n)} ranks" for r, (s, n) in list(steps.items())[:8])
        raise shards.refuse("zero-mixed", f"the model files are not of one checkpoint ({listed})")


def _base(state: Mapping[Any, Any]) -> Any:
    """The state of the optimizer that ZeRO holds."""
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))


def step_of(shards: Shards, state: Mapping[Any, Any]) -> float | None:
    """The optimizer's step: a number, or a tensor of one element, whose four bytes are read."""
    base = _base(state)
    if isinstance(base, dict):
        base = list(_mapping(base.get("state")).values())
    first = next((s for s in base or [] if isinstance(s, dict) and "step" in s), None)
    return None if first is None else number_of(shards, first["step"])


def number_of(shards: Shards, step: Any) -> float | None:
    """A step as a number, which may be a tensor of one element; None where it is something else."""
    if isinstance(step, Stored) and step.info.numel == 1 and step.info.dtype in (DType.F32, DType.I64):
        fd = open_input(Path(step.file), root=shards.folder)
        try:
            raw = read_exact(fd, step.offset, step.info.nbytes, file=step.file)
        finally:
            os.close(fd)
        return float(struct.unpack("<f" if step.info.dtype is DType.F32 else "<q", raw)[0])
    return float(step) if isinstance(step, int | float) and not isinstance(step, bool) else None


def shapes(shards: Shards, value: Any, file: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `param_shapes` or `frozen_param_shapes`.

    Raises:
        Refused: something else (`zero-malformed`).
    """
    sound = isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, tuple) and all(type(n) is int and n >= 0 for n in v)
        for k, v in value.items()
    )
    if not sound:
        raise shards.refuse("zero-malformed", "param_shapes is not a mapping of names to shapes", file=file)
    return dict(value)


def tensor_list(shards: Shards, value: Any, what: str, file: str) -> list[LazyTensor]:
    """A list of one-dimensional tensors.

    Raises:
        Refused: something else (`zero-malformed`).
    """
    if not isinstance(value, list) or not all(isinstance(t, LazyTensor) and len(t.info.shape) == 1 for t in value):
        raise shards.refuse("zero-malformed", f"{what} is not a list of flat tensors", file=file)
    return list(value)
