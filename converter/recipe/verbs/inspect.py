"""What `inspect` does: what a folder holds, from headers and configs alone, broken or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.examine import facts
from converter.families.quantised.reading import Quantised, read
from converter.families.words import CLASSIFIERS, OUTPUT_MODULES, VALUE_HEADS
from converter.recipe.verbs.allowing import allowing

if TYPE_CHECKING:
    from converter.core.tensors.dtypes import DType
    from converter.examine.diagnoses.case import Finding
    from converter.examine.doctor import Report
    from converter.sources.survey import Survey

HEADS = (*CLASSIFIERS, *VALUE_HEADS, *OUTPUT_MODULES)
"""Modules that come after a backbone, as transformers, TRL and the common trainers name them."""

LORA_MARK = ".lora_"


@dataclass(frozen=True)
class Inspection:
    """A folder, the source that knows it, what lies in it, and what doctor says of it.

    Attributes:
        asked: as the user wrote it.
        revision: the Hub commit, where it is known.
        report: doctor's, from headers and configs.
    """

    asked: str
    path: Path
    revision: str | None
    report: Report

    @property
    def survey(self) -> Survey:
        """Files and tensors."""
        return self.report.case.survey

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, or adapter_config.json of an adapter."""
        case = self.report.case
        return case.adapter_config if self.is_adapter else case.config

    @property
    def is_adapter(self) -> bool:
        """True for an adapter, false for a model."""
        return self.kind == "adapter"

    @property
    def is_training(self) -> bool:
        """True for a trainer's state, which has to be gathered."""
        return self.kind == "training"

    @property
    def kind(self) -> str:
        """`adapter`, `model`, or `training` for a trainer's state."""
        return self.report.case.kind

    @property
    def has_errors(self) -> bool:
        """True where a fault stops every verb."""
        return self.report.worst() == "error"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What doctor says of it, the worst first."""
        return self.report.findings

    @property
    def parameters(self) -> int:
        """The number of values; of a quantised weight those that it has once it is whole."""
        parts = {p for w, _ in self.quantised.weights for p in w.parts.values()}
        plain = sum(e.info.numel for n, e in self.survey.entries.items() if n not in parts)
        packed = (w.elements[1] if w.shape is None else math.prod(w.shape) for w, _ in self.quantised.weights)
        return plain + sum(packed)

    @cached_property
    def quantised(self) -> Quantised:
        """What of it is quantised."""
        return read({n: e.info for n, e in self.survey.entries.items()}, self.config)

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """The types of its tensors, by name."""
        return tuple(sorted({e.info.dtype for e in self.survey.entries.values()}, key=lambda d: d.value))

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """Tensors that come after a backbone, with their shapes."""
        entries = self.survey.entries
        names = (n for n in entries if any(p in HEADS for p in n.split(".")[:-1]) and LORA_MARK not in n)
        return {n: entries[n].info.shape for n in names}

    @property
    def saved_by(self) -> tuple[str, ...]:
        """Who saved it, as far as its files say."""
        return tuple(facts.made_by(self.report.case))

    @property
    def side_files(self) -> tuple[str, ...]:
        """Files beside the weights that loaders look for."""
        return tuple(facts.files_beside(self.report.case)[0])


def inspect(path: str | Path, *, revision: str | None = None, allow_name: Sequence[str] = ()) -> Inspection:
    """What a folder holds; reads headers and configs only.

    Args:
        path: a folder, or a name on the Hub.
        revision: Hub commit, branch or tag.
        allow_name: patterns of names of your own classes that pickled files may mention.

    Raises:
        UsageError: a file that is not part of a checkpoint, or two revisions.
        Refused: nothing local has that name (`path-missing`), or it can't be read from the Hub (`hub-download`).
    """
    from converter.examine.doctor import DoctorRequest, examine
    from converter.sources.locate import resolve

    asked = str(path)
    with allowing(allow_name):
        located = resolve(asked, revision=revision, in_parts=True)
        return Inspection(asked, located.path, located.revision, examine(DoctorRequest(asked, revision=revision)))
