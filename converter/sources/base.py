"""What every source shares: its kind, its place in the order, and a survey that never raises.

A source is one file with a value of a class made from these, and one entry point in the group
`rlhf_convert.sources`. `ModelSource` is for folders that loaders of models read, `AdapterSource` for those that go over
a model, `TrainingSource` for a trainer's own state, which `gather` makes a model or an adapter of.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from converter.core.checkpoint import Checkpoint, Origin
from converter.core.files.opening import identity
from converter.core.tensors.byte_runs import leaves
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused, UsageError
from converter.sources.beside import find_beside
from converter.sources.places import Place
from converter.sources.survey import Fault, SourceKind, StoredTensor, Survey, snapshot_of
from converter.text import show


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

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """What `held` gives, with the config, the tokenizer and what else lies beside it.

        Raises:
            UsageError: several checkpoints to choose from.
            Refused: files missing, cut short or malformed, each named.
        """
        held = self.held(root)
        beside = find_beside([held.folder], keep_code=keep_code)
        real = held.folder.resolve()
        name, commit = snapshot_of(held.folder) or (real.name, revision)
        digest = hashlib.sha256("\n".join(f"{n} {t}" for n, t in held.tensors.items()).encode()).hexdigest()
        read = {str((held.folder / n).absolute()): identity(held.folder / n) for n in held.files}
        return Checkpoint(
            tensors=dict(held.tensors),
            config=beside.config,
            origin=Origin(self.kind, str(real), asked, name, commit, digest, self.name),
            side_files=beside.files,
            config_bytes=beside.config_bytes,
            inputs=beside.inputs | read,
            said=(*held.said, *beside.said),
        )

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

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The folder itself where it is of this source; sources whose checkpoints lie deeper look there.

        Raises:
            UsageError: `--tag` names another one (`no-such-tag`).
        """
        why = self.detect(root)
        if why is not None and tag not in (None, root.name):
            raise UsageError("no-such-tag", f"there is no {show(tag)} here", where=show(asked))
        return None if why is None else Place(root, why)


def fault_of(error: Refused | UsageError, root: Path) -> Fault:
    """A refusal as a fault of a survey."""
    where = error.where or show(root)
    return Fault(code=error.code, severity="error", text=error.what, where=where, next=error.next)
