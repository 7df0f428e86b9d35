"""What a diagnosis is given, and what it says."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from converter.blanks import new_name
from converter.converters.heads.whole import Judgement, judge
from converter.core.checkpoint import Checkpoint, Origin
from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from converter.core.files.strict_json import MAX_JSON_BYTES, load_json
from converter.core.tensors.dtypes import TensorInfo
from converter.diagnostic import Command, Diagnostic, Severity, as_argument, spelled
from converter.errors import ConvertError, Refused
from converter.examine.diagnoses.script import Launch
from converter.families.plain_names import Plain, plain_names
from converter.sources.finding import sources
from converter.sources.survey import SourceKind, StoredTensor, Survey, file_names
from converter.text import fold, show

T = TypeVar("T")
Applicability = Literal["safe", "unsafe", "display-only"]
Kind = Literal["model", "adapter", "training", "delta", "weights", "run", "unread"]

SEVERITIES: tuple[Severity, ...] = ("error", "changes-numbers", "cosmetic")
"""From the worst to the least."""

HERE, LOST = "here", "lost"
"""Recoverability, where it is not `from SOURCE`: from the folder itself, or from nothing."""

MAX_EVIDENCE = 3
_TOKENIZER_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Finding(Diagnostic):
    """One fault of a folder; at most three lines of evidence; commands have the user's own paths.

    Attributes:
        tensors: names of all tensors concerned; screens fold them.
        recoverability: `here`, `from <source>`, `lost`, or empty where nothing is missing.
        fix: names of the converters that fix it, in order.
        applicability: `safe`: no number changes; `unsafe`: needs consent; `display-only`: no converter fixes it.
    """

    tensors: tuple[str, ...] = ()
    recoverability: str = ""
    fix: tuple[str, ...] = ()
    applicability: Applicability = "display-only"

    def to_json(self) -> dict[str, Any]:
        """The finding as `doctor --json` prints it."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.text,
            "tensors": list(self.tensors),
            "evidence": list(self.evidence),
            "recoverability": self.recoverability,
            "fix": list(self.fix),
            "applicability": self.applicability,
            "next": spelled(self.next),
        }


@dataclass(frozen=True)
class Near:
    """A folder that may hold what is missing: shards, checkpoints or models in, beside and above, or given.

    Attributes:
        asked: its path as the user would type it.
        source: the source that reads it, `deepspeed`, `hf`, ...
        given: named with `--weights-from`.
    """

    asked: str
    path: Path
    source: str
    given: bool = False

    @property
    def is_training(self) -> bool:
        """True for a trainer's own shards."""
        return self.kind == "training"

    @property
    def kind(self) -> SourceKind:
        """What the folder is: a model, an adapter, or a trainer's state."""
        return sources()[self.source].kind

    @property
    def argument(self) -> str:
        """Its path as a word of a command."""
        return as_argument(self.asked)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its config.json, or nothing."""
        return self._json(MODEL_CONFIG)

    @cached_property
    def adapter_config(self) -> Mapping[str, Any]:
        """Its adapter_config.json, or nothing."""
        return self._json(ADAPTER_CONFIG)

    def _json(self, name: str) -> Mapping[str, Any]:
        try:
            value = load_json(self.path / name, limit=_TOKENIZER_BYTES, root=self.path, allow_nan=True)
        except (ConvertError, OSError):
            return {}
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Case:
    """A folder under examination.

    Attributes:
        kind: what it is; `run` is a folder that only holds checkpoints, `weights` a lone weight file's folder.
        source: the source that reads it, None where none does.
        why: how it was recognised.
        near: where missing weights may lie.
        base: the base model, of an adapter or as given, where it is at hand.
        actor: the folder that `--with-actor` names.
        target: the trainer that `--for` names.
        deep: values may be read.
        launch: the script that `--launch` names, read.
        resume_on: ranks that the run is to go on with, as `--resume-on` says.
    """

    asked: str
    root: Path
    kind: Kind
    source: str | None
    survey: Survey
    why: str = ""
    near: tuple[Near, ...] = ()
    base: Case | None = None
    actor: Case | None = None
    target: str | None = None
    deep: bool = False
    launch: Launch | None = None
    resume_on: int | None = None
    _json: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    _memos: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def changed(self, entries: dict[str, StoredTensor], config: Mapping[str, Any]) -> Case:
        """The folder as it would be with other tensors and another config.json."""
        survey = replace(self.survey, entries=entries)
        return replace(self, survey=survey, _json={**self._json, MODEL_CONFIG: config}, _memos={})

    def once(self, key: str, compute: Callable[[Case], T]) -> T:
        """The value of `compute(case)`, computed at the first call: several diagnoses may share it.

        Args:
            key: the name of the value; two functions never share one.
        """
        if key not in self._memos:
            self._memos[key] = compute(self)
        value: T = self._memos[key]
        return value

    @cached_property
    def names(self) -> frozenset[str]:
        """Files in the folder."""
        return file_names(self.root)

    @cached_property
    def shapes(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape by tensor name."""
        return {name: entry.info for name, entry in self.survey.entries.items()}

    @property
    def trainer(self) -> str:
        """The trainer that `--for` or the launch script names, without a version; empty where neither does."""
        return (self.target or "").partition("@")[0]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What was surveyed as a checkpoint, faults and all, for functions that look at names and shapes."""
        pickled = any(not n.endswith(".safetensors") for n in self.survey.files)
        stored = "torch" if pickled else "safetensors"
        kind = "adapter" if self.kind == "adapter" else "model"
        return Checkpoint(
            {n: e.tensor for n, e in self.survey.entries.items()},
            self.config,
            Origin(kind, str(self.root), self.asked, self.root.name, None, "", stored),
            beside={name: dict(file.tensors) for name, file in self.survey.beside.items()},
        )

    @cached_property
    def plain(self) -> Plain:
        """The tensors' names without what wrappers put into them."""
        return plain_names(self.shapes, self.config)

    @cached_property
    def judgement(self) -> Judgement:
        """The tensors, wrappers looked through, against what the class in config.json asks for."""
        return judge(self.checkpoint, self.plain.names)

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, or nothing where it is missing or no object."""
        return self.json(MODEL_CONFIG)

    @property
    def adapter_config(self) -> Mapping[str, Any]:
        """adapter_config.json, or nothing."""
        return self.json(ADAPTER_CONFIG)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the text model: nested in that of a multi-modal one."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def json(self, name: str) -> Mapping[str, Any]:
        """A JSON file of the folder as a mapping; empty where it can't be read (see `json_error`)."""
        self._read(name)
        value = self._json[name]
        return value if isinstance(value, dict) else {}

    def json_error(self, name: str) -> ConvertError | None:
        """Why a JSON file that is there can't be read."""
        self._read(name)
        value = self._json[name]
        return value if isinstance(value, ConvertError) else None

    def _read(self, name: str) -> None:
        if name in self._json:
            return
        value: Any = None
        if name in self.names:
            try:
                limit = MAX_JSON_BYTES if name in (MODEL_CONFIG, ADAPTER_CONFIG) else _TOKENIZER_BYTES
                value = load_json(self.root / name, limit=limit, root=self.root, allow_nan=True)
                if not isinstance(value, dict):
                    value = Refused("json-malformed", "it holds no JSON object", where=show(self.root / name))
            except ConvertError as error:
                value = error
        self._json[name] = value

    @cached_property
    def folder(self) -> str:
        """The folder as the user typed it: the one that a named file is in, and `./-rm`, which is not an option."""
        typed = self.asked
        if self.kind != "weights" and Path(typed).expanduser().is_file():
            typed = os.path.dirname(typed) or "."
        return as_argument(typed)

    def command(self, verb: str, *options: str, out: str = "") -> Command:
        """The command that makes another folder of this one.

        Args:
            out: the word at the end of the new folder's name (see `out`); none where the verb writes nothing.
        """
        written = (self.out(out),) if out else ()
        return Command(verb, (self.folder, *written, *options))

    def repair(self, *options: str) -> Command:
        """The command that fixes what is wrong in the folder itself."""
        return self.command("repair", *options, out="fixed")

    def out(self, word: str, beside: Near | None = None) -> str:
        """A path for a command to write to, beside this folder or another, and not there yet: `./rm-fixed`."""
        return new_name(self.folder if beside is None else beside.asked, word)

    def training_near(self) -> list[Near]:
        """Trainers' shards at hand, those that the user named first."""
        return sorted((n for n in self.near if n.is_training), key=lambda n: not n.given)


Find = Callable[[Case, Context], Iterable[Finding]]


@dataclass(frozen=True)
class Diagnosis:
    """A function that looks for one fault, and what the catalogue says of it.

    Attributes:
        code: kebab-case, stable; every finding of the function has it.
        kinds: the kinds of folder that it looks at.
        deep: it reads values, so it runs under `--deep` only.
        doc: what `explain CODE` prints.
    """

    code: str
    find: Find
    kinds: frozenset[Kind]
    deep: bool
    doc: str

    def __call__(self, case: Case, context: Context) -> list[Finding]:
        """Findings about this folder; nothing where it isn't of the right kind."""
        if case.kind not in self.kinds or (self.deep and not case.deep):
            return []
        return list(self.find(case, context))


ALL_KINDS: tuple[Kind, ...] = ("model", "adapter", "training", "delta", "weights", "run", "unread")


def diagnosis(code: str, *kinds: Kind, deep: bool = False) -> Callable[[Find], Diagnosis]:
    """Make a diagnosis of a function; its docstring is the explanation."""

    def make(find: Find) -> Diagnosis:
        doc = inspect.cleandoc(find.__doc__ or "")
        return Diagnosis(code, find, frozenset(kinds or ALL_KINDS), deep, doc)

    return make


def folded(case: Case, names: Iterable[str], most: int = MAX_EVIDENCE) -> tuple[str, ...]:
    """Lines of evidence: names folded by layer, each with the shape and dtype of its first tensor."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), []).append(name)
    lines = []
    for group in list(groups.values())[:most]:
        info = case.shapes.get(group[0])
        shape = f"  {tuple(info.shape)} {info.dtype.torch_name}" if info is not None else ""
        lines.append(f"{fold(group)}{shape}")
    if len(groups) > most:
        lines[-1] = f"{lines[-1]}, and {len(groups) - most} more kinds"
    return tuple(lines)


def _pattern(name: str) -> str:
    return "".join("#" if c.isdigit() else c for c in name)
