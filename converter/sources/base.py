"""What every source shares: its kind, its place in the order, and a survey that never raises.

A source is one file with a value of a class made from these, and one entry point in the group
`rlhf_convert.sources`. `ModelSource` is for folders that loaders of models read, `AdapterSource` for those that go over
a model, `TrainingSource` for a trainer's own state, which `gather` makes a model or an adapter of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from converter.core.checkpoint import Checkpoint
from converter.core.tensors.byte_runs import leaves
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused, UsageError
from converter.sources.survey import Fault, StoredTensor, Survey
from converter.text import show

SourceKind = Literal["model", "adapter", "training", "unread"]
"""What a source's folders are; `unread`: recognised, and refused by name."""


@dataclass(frozen=True)
class Held:
    """What a folder holds.

    Attributes:
        folder: where the files are: the source's folder, or the one below it that is meant.
        files: names of the files that were looked at, in order.
        tensors: by name.
        said: what is good to know and changes nothing.
    """

    folder: Path
    files: Sequence[str]
    tensors: Mapping[str, LazyTensor]
    said: Sequence[str] = field(default=())


class BaseSource(ABC):
    """A source whose survey is what `held` gives, or the refusal of it as a fault.

    Attributes:
        precedence: sources of higher ones are asked first.
        note_code: the code under which `Held.said` is reported.
    """

    name: ClassVar[str]
    kind: ClassVar[SourceKind]
    precedence: ClassVar[int] = 0
    note_code: ClassVar[str] = "source-note"

    @abstractmethod
    def detect(self, root: Path) -> str | None:
        """Why a folder is of this source, or None; names of files tell, contents are not read."""

    @abstractmethod
    def held(self, root: Path) -> Held:
        """Files and tensors of a folder, from headers.

        Raises:
            UsageError: several checkpoints to choose from.
            Refused: files missing, cut short or malformed, each named.
        """

    @abstractmethod
    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint, or a refusal.

        Raises:
            UsageError: several checkpoints to choose from.
            Refused: files missing, cut short or malformed, each named.
        """

    def survey(self, root: Path) -> Survey:
        """Files, tensors and faults; content never raises."""
        survey = Survey(root)
        try:
            held = self.held(root)
        except (Refused, UsageError) as error:
            survey.faults.append(fault_of(error, root))
            return survey
        survey.files = {n: (held.folder / n).stat().st_size for n in held.files}
        for name, tensor in held.tensors.items():
            first = next(leaves(tensor), None)
            survey.entries[name] = StoredTensor(tensor, str(held.folder) if first is None else first.file)
        survey.faults += [
            Fault(code=self.note_code, severity="cosmetic", text=text, where=show(root)) for text in held.said
        ]
        return survey


class ModelSource(BaseSource):
    """A folder that a loader of models reads."""

    kind = "model"


class AdapterSource(BaseSource):
    """A folder with an adapter, which goes over a base model."""

    kind = "adapter"


class TrainingSource(BaseSource):
    """A trainer's own state: sharded by rank, under its names in memory. It is asked before models and adapters."""

    kind = "training"
    precedence = 10


def fault_of(error: Refused | UsageError, root: Path) -> Fault:
    """A refusal as a fault of a survey."""
    where = error.where or show(root)
    return Fault(code=error.code, severity="error", text=error.what, where=where, next=error.next)
