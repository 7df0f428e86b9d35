"""What lies in a folder, broken or not: the raw material of `inspect` and of refusals."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from converter.core.checkpoint import WeightSet
from converter.core.files.names import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLED,
    ADAPTER_WEIGHTS,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    PICKLED_INDEX,
)
from converter.core.formats.weight_file import WeightFile
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command, Diagnostic, Next
from converter.errors import Refused
from converter.text import fold, show

FolderKind = Literal["model", "adapter"]
SourceKind = Literal["model", "adapter", "training", "delta", "unread"]
"""What a source's folders are; `delta`: the difference of two models; `unread`: recognised, and refused by name."""

SHARD = re.compile(r"model-(\d{5,6})-of-(\d{5,6})\.safetensors", re.ASCII)
PICKLED = re.compile(r"(?:pytorch_model|model|consolidated)[\w.-]*\.(?:bin|pt|pth)", re.ASCII)
_TAG = re.compile(r"global_step\d+", re.ASCII)
_REPOSITORY = re.compile(r"models--([\w.-]+)", re.ASCII)
PICKLED_SHARD = re.compile(r"pytorch_model-(\d{5,6})-of-(\d{5,6})\.bin", re.ASCII)
_WEIGHTS = re.compile(r"[\w.-]+\.(?:safetensors|bin|pt|pth|gguf)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Fault(Diagnostic):
    """One thing that is wrong in what a source surveys; an `error` is what `open` refuses."""

    @classmethod
    def of(cls, error: Refused) -> Fault:
        """A refusal as a fault."""
        details = [f"expected {error.expected}"] if error.expected else []
        details += [f"got {error.got}"] if error.got else []
        text = error.what + (f" ({', '.join(details)})" if details else "")
        facts = tuple(error.facts.items())
        return cls(code=error.code, severity="error", text=text, where=error.where or "", next=error.next, facts=facts)

    def refusal(self) -> Refused:
        """The fault as an error."""
        return Refused(self.code, self.text, where=self.where, next=self.next, facts=dict(self.facts))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor found in a file, named by its absolute path."""

    tensor: LazyTensor
    file: str

    @property
    def info(self) -> TensorInfo:
        """Dtype and shape."""
        return self.tensor.info


@dataclass
class Survey:
    """Files with their sizes, tensors by name, and faults.

    Attributes:
        files: weight files in order, name mapped to size in bytes.
        entries: tensors in file order.
        beside: files of a head of its own (`value_head.safetensors`), by name; neither in `files` nor in `entries`.
        unread: weight files beside an adapter that nothing is known to read, and that are no whole model, by name.
        wrapped: pickled files whose tensors lie further down than at the top, with the keys that lead there.
        sets: every set of weight files where there are several; `entries` are those of one.
    """

    root: Path
    files: dict[str, int] = field(default_factory=dict)
    entries: dict[str, StoredTensor] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    beside: dict[str, WeightFile] = field(default_factory=dict)
    unread: dict[str, WeightFile] = field(default_factory=dict)
    wrapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sets: tuple[WeightSet, ...] = ()

    def error(self) -> Refused | None:
        """The refusal that the faults amount to: the first error, and how many more there are."""
        errors = [f for f in self.faults if f.severity == "error"]
        if not errors:
            return None
        refusal = errors[0].refusal()
        if len(errors) > 1:
            rest = f"{len(errors) - 1} more {'fault' if len(errors) == 2 else 'faults'}"
            refusal.what += f" (and {rest}; {Command('inspect', (str(self.root),))} lists them)"
        return refusal


def file_names(root: Path) -> frozenset[str]:
    """Names of what lies in a folder and is not a folder; nothing where it can't be listed."""
    try:
        with os.scandir(root) as listed:
            return frozenset(entry.name for entry in listed if not _is_folder(entry))
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return frozenset()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False too for a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def snapshot_of(root: Path) -> tuple[str, str] | None:
    """Repository and commit of a snapshot in the Hub's cache (`models--OWNER--NAME/snapshots/COMMIT`).

    Of a folder in a snapshot: the repository with that folder behind it, `owner/name/checkpoint-500`.
    """
    real = root.resolve()
    for folder in (real, *real.parents):
        repo_id = repository_of(folder.parent.parent) if folder.parent.name == "snapshots" else None
        if repo_id is not None:
            inner = real.relative_to(folder).as_posix()
            return (repo_id if inner == "." else f"{repo_id}/{inner}"), folder.name
    return None


def name_of(root: Path) -> str:
    """What a receipt calls a folder: its own name, or the repository's where it is from the Hub."""
    found = snapshot_of(root)
    return found[0] if found is not None else root.resolve().name


def repository_of(folder: Path) -> str | None:
    """The repository that a folder of the Hub's cache is for: `models--OWNER--NAME`."""
    made = _REPOSITORY.fullmatch(folder.name)
    return made[1].replace("--", "/", 1) if made else None


def folder_kind(names: Collection[str]) -> FolderKind | None:
    """What a folder with these files is. Where both lie in it transformers takes it for the adapter, and so do we."""
    model = is_weights_of_model(names)
    adapter = ADAPTER_WEIGHTS in names or ADAPTER_PICKLED in names
    if ADAPTER_CONFIG in names and (adapter or not model):
        return "adapter"
    if model:
        return "model"
    return "adapter" if adapter else None


def is_weights_of_model(names: Collection[str]) -> bool:
    """True where weights of a whole model are among these files, pickled ones included."""
    known = (MODEL_WEIGHTS, MODEL_INDEX, PICKLED_INDEX)
    return any(n in names for n in known) or any(SHARD.fullmatch(n) or PICKLED.fullmatch(n) for n in names)


def is_weight_file(name: str) -> bool:
    """True for names that weight files of any container have."""
    return _WEIGHTS.fullmatch(name) is not None


def leftovers(root: Path, names: Collection[str], read: Collection[str]) -> list[Fault]:
    """Faults of what lies beside the weights: downloads that did not finish, weight files that nothing reads."""
    faults = []
    partial = sorted(n for n in names if n.endswith((".incomplete", ".part", ".aria2", ".crdownload")))
    for folder in _download_folders(root):
        partial += sorted(n for n in file_names(folder) if n.endswith(".incomplete"))
    if partial:
        text = f"a download did not finish: {fold(partial)}"
        faults.append(
            Fault(
                code="download-unfinished", severity="cosmetic", text=text, where=show(root), next="download it again"
            )
        )
    others = other_weights(names, read)
    if others:
        text = f"weight files that are not read lie beside: {fold(others)}"
        faults.append(Fault(code="stray-weights", severity="cosmetic", text=text, where=show(root)))
    return faults


def other_weights(names: Collection[str], read: Collection[str]) -> list[str]:
    """Weight files by their names, but for those that are read and for what a trainer keeps to resume."""
    return sorted(n for n in names if _WEIGHTS.fullmatch(n) and n not in read and not _TRAINING_STATE.fullmatch(n))


def _download_folders(root: Path) -> list[Path]:
    """Where huggingface_hub keeps what it is downloading: below a local folder, or in the cache."""
    parent = root.resolve().parent
    cache = [parent.parent / "blobs"] if parent.name == "snapshots" else []
    return [root / ".cache" / "huggingface" / "download", *cache]


_TRAINING_STATE = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states)[\w.-]*", re.ASCII)


def empty_tensors(names: Iterable[str], entries: Mapping[str, StoredTensor], where: str) -> Fault:
    """The fault of tensors that ZeRO-3 saved without gathering, with the shapes that their siblings show."""
    found = list(names)
    siblings = {_pattern(n): e.info.shape for n, e in entries.items() if e.info.numel}
    shapes = list(dict.fromkeys(_shape(siblings[_pattern(n)]) for n in found if _pattern(n) in siblings))
    expected = f"; those beside them are {', '.join(shapes[:4])}" if shapes else ""
    return Fault(
        code="zero3-empty-tensors",
        severity="error",
        text=f"{len(found)} of {len(entries)} tensors are torch.Size([0]): {fold(found)}{expected}. "
        "ZeRO-3 saved them without gathering",
        where=where,
        next=_repair_command(Path(where) if Path(where).is_dir() else Path(where).parent),
    )


def _repair_command(root: Path) -> Next:
    """The command that fills a folder's empty tensors: it looks for shards in the folder and beside it by itself."""
    around = [p.name for place in (root, root.resolve().parent) if place.is_dir() for p in place.iterdir()]
    command = Command("repair", (str(root), "OUT"))
    if any(_TAG.fullmatch(name) for name in around):
        return command
    return command.with_options("--weights-from", "DIR")


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
