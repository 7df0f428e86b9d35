"""A checkpoint is a value: a mapping of tensor names to lazy tensors, with config, side files and ties.

It reads nothing: `len`, `in`, iteration, `[name].dtype`, `[name].shape` and `repr` answer from what headers said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Self

from converter.core.files.opening import Identity
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import fold, format_size, show

MODEL, ADAPTER, TRAINING, DELTA, STATE = "model", "adapter", "training", "delta", "state"
"""What a checkpoint is, as `Origin.kind` says; `delta`: the difference of two models."""

Container = Literal["safetensors", "torch", "distcp", "trees"]
"""What weights are written in: safetensors; torch's zip format (`pytorch_model.bin`), all that some loaders read; or a
distributed checkpoint (`.distcp` files and `.metadata`), or files of torch's that hold more than tensors."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that travels with the weights: copied from `source` (absolute path), or written from `content`."""

    source: str | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class RecordCheck:
    """Bytes of an input whose CRC-32 its container records; a run that uses any of them compares all."""

    file: str
    offset: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from.

    Attributes:
        kind: `model`, `adapter`, `delta`, `training`: the state of a trainer, whose names are those in memory; or
            `state`: the tensors of one under these names, which are no model.
        path: the folder that was opened, absolute; never written into an output.
        asked: what the user typed, for screens.
        name: for the receipt: the Hub id, else the folder's own name.
        revision: the Hub commit, where known.
        header_digest: sha256 over the shards' header bytes in file order, hexadecimal.
        stored_format: container of the tensors, `safetensors`, or the trainer's layout in words.
        ends_recorded: the files record how large each tensor is; where they don't, pieces at its end may be missing.
    """

    kind: str
    path: str
    asked: str
    name: str
    revision: str | None
    header_digest: str
    stored_format: str
    ends_recorded: bool = True


@dataclass(frozen=True)
class WeightSet:
    """One of several sets of weight files in a folder, of which one is the model's.

    Attributes:
        name: `model.safetensors`, or `model-*-of-00003.safetensors`, or the index that lists the files.
        files: those that can be read, in order: tensors by name.
        faults: why others can't be, in words.
    """

    name: str
    files: Mapping[str, Mapping[str, LazyTensor]]
    faults: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor by name, the first file's where two have it."""
        found: dict[str, LazyTensor] = {}
        for file in self.files.values():
            found |= {n: t for n, t in file.items() if n not in found}
        return found

    @property
    def twice(self) -> dict[str, list[str]]:
        """Names that are in several files, with these files."""
        homes: dict[str, list[str]] = {}
        for file, tensors in self.files.items():
            for name in tensors:
                homes.setdefault(name, []).append(file)
        return {n: files for n, files in homes.items() if len(files) > 1}


@dataclass(frozen=True)
class Checkpoint(Mapping[str, LazyTensor]):
    """Tensor names mapped to lazy tensors, with everything else that makes a folder load.

    As a mapping it is its main tensors, in file order; those of the files beside them are in `beside`.

    Attributes:
        tensors: in file order: by shard, then by offset.
        config: `config.json`, or `adapter_config.json` of an adapter.
        side_files: name in the output folder mapped to its source; the config is not among them.
        ties: groups of names that are one tensor for the model, though perhaps only one of them is stored.
        shards: tensor name mapped to the file it is stored in; empty where that means nothing.
        config_bytes: the config file verbatim, written back where `config` is unchanged.
        metadata: `__metadata__` of the safetensors files.
        dropped: tensors that a step was asked to drop, with the reason.
        left: of the dropped tensors those whose names the inputs don't have: renamed by a step before.
        inputs: every file read so far, absolute, with its identity when its header was read.
        checks: checksums that its files record of their tensors' bytes.
        said: what the source chose or found (a tag, a config beside the shards), for the screen and the receipt.
        trained: names of the tensors that an optimizer held; None where that isn't recorded.
        set_aside: inputs, by the path of their origin, of which no tensor is meant to be used, with the reason.
        repaired: tensors that were lost and are filled, with the place that each comes from in words.
        beside: weight files beside the main ones (`value_head.safetensors`), by file name: tensors by their names in
            that file. The file's suffix says its container; a step that takes the tensors over takes the file out.
        unread: weight files of the folder that no loader reads and that are not known to be copies, by file name.
        container: what the main weight files are written in.
        subfolder: folder below the output that they and their index are written to (ColossalChat's `modeling`); the
            config and everything else stay at the top.
        sets: where a folder holds several sets of weight files, all of them, the one that loaders read first; `tensors`
            are one of them until a step has chosen.
        one_file: the main weights must be in one file, however large: what loads them reads no index.
        stem: how the name of the main weight file begins, where a program looks for another one than the usual.
        under: keys of the dictionaries that a distributed checkpoint has the model in.
        copies: tensors that several ranks saved: the name, what is taken, and another rank's, which must be equal.
        boxes: by name, how many leading dimensions of a tensor such a checkpoint has index by index; absent: none.
        trees: what files of torch's say, by path, their tensors lazy: they are written in place of `tensors`.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any]
    origin: Origin
    side_files: Mapping[str, SideFile] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    shards: Mapping[str, str] = field(default_factory=dict)
    config_bytes: bytes | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    left: tuple[LazyTensor, ...] = ()
    inputs: Mapping[str, Identity] = field(default_factory=dict)
    checks: tuple[RecordCheck, ...] = ()
    said: tuple[str, ...] = ()
    trained: frozenset[str] | None = None
    set_aside: Mapping[str, str] = field(default_factory=dict)
    repaired: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    unread: Mapping[str, Mapping[str, LazyTensor]] = field(default_factory=dict)
    container: Container = "safetensors"
    subfolder: str = ""
    sets: tuple[WeightSet, ...] = ()
    one_file: bool = False
    stem: str = ""
    under: tuple[str, ...] = ()
    copies: tuple[tuple[str, LazyTensor, LazyTensor], ...] = ()
    boxes: Mapping[str, int] = field(default_factory=dict)
    trees: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LazyTensor:
        """The lazy tensor of that name; `converter.to_torch` reads its values."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in file order."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.tensors)

    def __bool__(self) -> bool:
        """True, without any tensor too: a checkpoint is there or is None."""
        return True

    def __repr__(self) -> str:
        """`<Checkpoint ./rm: model, 339 tensors, 14.1 GB>`."""
        count = f"{len(self)} {'tensor' if len(self) == 1 else 'tensors'}"
        return f"<Checkpoint {show(self.origin.asked)}: {self.origin.kind}, {count}, {format_size(self.total_bytes)}>"

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; a changed `config` forgets `config_bytes`."""
        if "config" in changes and changes["config"] != self.config:
            changes.setdefault("config_bytes", None)
        return dataclasses.replace(self, **changes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they would be written, those in files beside the main ones included."""
        return sum(t.info.nbytes for t in self.all_tensors())

    def all_tensors(self) -> Iterator[LazyTensor]:
        """The tensors, then those of the files beside."""
        yield from self.tensors.values()
        for file in self.beside.values():
            yield from file.values()

    def tied_to(self, name: str) -> tuple[str, ...]:
        """The other names of the tie that `name` belongs to, or nothing."""
        return next((tuple(n for n in group if n != name) for group in self.ties if name in group), ())

    def rename(self, names: Mapping[str, str]) -> Self:
        """The same tensors under other names; names that are not in `names` stay, and so do those in files beside.

        Raises:
            Refused: two tensors would get one name (`rename-collision`).
        """
        new = [names.get(name, name) for name in self.tensors]
        if len(set(new)) != len(new):
            twice = sorted({n for n in new if new.count(n) > 1})
            raise Refused(
                "rename-collision", f"two tensors would be named {fold(twice)}", where=show(self.origin.asked)
            )
        return self.replace(
            tensors=dict(zip(new, self.tensors.values(), strict=True)),
            ties=tuple(tuple(names.get(n, n) for n in group) for group in self.ties),
            shards={names.get(n, n): file for n, file in self.shards.items()},
            trained=None if self.trained is None else frozenset(names.get(n, n) for n in self.trained),
            repaired={names.get(n, n): words for n, words in self.repaired.items()},
        )


class InputMarker:
    """In a recipe such a field is the name of an input; when the converter runs it holds the opened checkpoint."""


INPUT: Final = InputMarker()

Input = Annotated[Checkpoint, INPUT]
"""A field of a converter that names one of the recipe's inputs. `tuple[Input, ...]` names several."""
