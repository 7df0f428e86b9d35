"""Ranks' files in Megatron's old format, and whether they are of one save, each in the folder of its own rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converter.core.checkpoint import RecordCheck
from converter.core.files.opening import Identity
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.megatron.names import Value
from converter.families.megatron.rows import EMBEDDING
from converter.sources.megatron_files import expect_own_name
from converter.text import show

_FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class RankFile:
    """One rank's model."""

    tp: int
    pp: int
    ep: int
    path: Path
    chunks: list[dict[str, LazyTensor]]


@dataclass
class Ranks:
    """All ranks' files, and what the training script was called with."""

    folder: Path
    arguments: dict[str, Value]
    files: list[RankFile] = field(default_factory=list)
    checks: list[RecordCheck] = field(default_factory=list)
    inputs: dict[str, Identity] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    def size(self, key: str) -> int:
        """An argument that counts ranks; 1 where it is not there."""
        value = self.arguments.get(key)
        return value if type(value) is int and value > 0 else 1

    @property
    def tp(self) -> int:
        """Ranks over which matrices are split."""
        return self.size("tensor_model_parallel_size")

    @property
    def pp(self) -> int:
        """Ranks over which layers are split."""
        return self.size("pipeline_model_parallel_size")

    @property
    def ep(self) -> int:
        """Ranks over which experts are split."""
        return self.size("expert_model_parallel_size")

    @property
    def expert_tp(self) -> int:
        """Ranks over which an expert's matrices are split."""
        value = self.arguments.get("expert_tensor_parallel_size")
        return value if type(value) is int and value > 0 else self.tp

    def refuse(self, code: str, what: str, *, next: str | None = None) -> Refused:
        """A refusal about the folder."""
        return Refused(code, what, where=show(self.folder), next=next)


def expect_own_files(written: list[tuple[str, tuple[int, int], Value, Value]], ranks: Ranks) -> None:
    """Go on where each file lies in the folder of the rank that wrote it, as far as processes' numbers are recorded.

    Processes count TP first and stages last, which is Megatron's order where nothing else was asked for. What converts
    checkpoints writes one number into all of them.

    Args:
        written: each folder's name, its TP and PP rank, and the process and the number of processes that are recorded.
    """
    if ranks.arguments.get("use_tp_pp_dp_mapping") or len({number for _, _, number, _ in written}) < len(written):
        return
    for name, own, number, world in written:
        if (
            type(number) is not int
            or type(world) is not int
            or not 0 <= number < world
            or world % (ranks.tp * ranks.pp)
        ):
            continue
        wrote = (number % ranks.tp, number // (world // ranks.pp))
        if wrote != own:
            what = f"{show(name)} was written by process {number} of {world}, which is TP {wrote[0]}, PP {wrote[1]}"
            raise ranks.refuse("megatron-mixed", what, next="give the folder of each rank its own file back")


def expect_no_copy(ranks: Ranks, file: RankFile, first: Path) -> None:
    """Two ranks have the same values only where no layer is split between them: of experts, on a stage without any.

    Args:
        first: the first file that has the values of this one.
    """
    names = [n for chunk in file.chunks for n in chunk]
    other = next((f for f in ranks.files if f.path == first), file)
    parted = (file.tp, file.pp) != (other.tp, other.pp) or any(".experts." in n for n in names)
    if other is not file and parted and any(".layers." in n for n in names):
        given, held = show(file.path.parent.name), show(first.parent.name)
        raise ranks.refuse(
            "megatron-copies",
            f"{given} has the values of {held}, number by number: one file is a copy of the other",
            next="put back the file of that rank, from the node that wrote it; nothing else holds its values",
        )


def expect_one_iteration(found: Mapping[str, Value], ranks: Ranks) -> None:
    """Go on where all files are of one iteration, and of that which the folder's name has.

    Args:
        found: what each rank's file says, by the names of their folders.

    Raises:
        Refused: they are not (`megatron-mixed`).
    """
    numbered = {name: n for name, n in found.items() if type(n) is int}
    first = next(iter(numbered.items()), None)
    for name, number in numbered.items():
        if first is not None and number != first[1]:
            what = f"{show(name)} is of iteration {number}, and {show(first[0])} of {first[1]}"
            raise ranks.refuse("megatron-mixed", what, next="put the files of one save into one folder")
    if first is not None:
        expect_own_name(ranks.folder, first[1], "what its ranks saved")


def expect_ends(ranks: Ranks) -> None:
    """Go on where the first stage has the embedding, and the last one alone the norm behind all layers.

    Raises:
        Refused: files of stages were exchanged (`megatron-mixed`).
    """
    for file in ranks.files:
        is_first, is_last = file.pp == 0, file.pp == ranks.pp - 1
        names = {n for chunk in file.chunks for n in chunk}
        norm = _FINAL_NORM in names
        if (is_first and EMBEDDING not in names and _anywhere(EMBEDDING, ranks)) or (norm and not is_last):
            which = "without the embedding" if EMBEDDING not in names else "with the norm behind all layers"
            what = f"{show(file.path.parent.name)} is of stage {file.pp} of {ranks.pp} by its name, and {which}"
            raise ranks.refuse("megatron-mixed", what, next="give the folder of each rank its own file back")


def _anywhere(name: str, ranks: Ranks) -> bool:
    return any(name in chunk for f in ranks.files for chunk in f.chunks)
