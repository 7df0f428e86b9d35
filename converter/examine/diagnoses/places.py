"""Where else a head may be: adapters, models and shards around a folder, by their headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from converter.converters.heads.detect import head_like
from converter.diagnostic import as_argument
from converter.examine.diagnoses.case import Case, Near
from converter.sources.hf import peft
from converter.sources.hf import source as hf
from converter.sources.survey import Survey

MOST_READ = 8
"""Folders around one whose headers are read for a head."""

_SIDECARS = ("value_head.safetensors", "value_head.bin", "value_head.pt")
_LORA = re.compile(r"\.lora_", re.ASCII)
_NUMBER = re.compile(r"\.\d+\.", re.ASCII)


@dataclass(frozen=True)
class Elsewhere:
    """A folder that holds a head.

    Attributes:
        names: the head's tensors in it; nothing for shards, whose files are not read for this.
        is_inside: it lies in the folder that is examined.
    """

    asked: str
    kind: Literal["training", "adapter", "model"]
    names: tuple[str, ...] = ()
    given: bool = False
    is_inside: bool = False

    @property
    def argument(self) -> str:
        """Its path as a word of a command."""
        return as_argument(self.asked)


def head_elsewhere(case: Case, only: Literal["adapter"] | None = None) -> Elsewhere | None:
    """The likeliest folder around that holds a whole head: one that was given, shards, an adapter, another model.

    A model beside counts only if it was given: a folder of models holds strangers.
    """
    found = [] if only else [_training(case, n) for n in case.training_near()[:1]]
    for near in [n for n in case.near if n.source in ("hf", "peft")][:MOST_READ]:
        kind: Literal["adapter", "model"] = "adapter" if near.source == "peft" else "model"
        if (only and kind != only) or (kind == "model" and not near.given):
            continue
        survey = peft.SOURCE.survey(near.path) if kind == "adapter" else hf.SOURCE.survey(near.path)
        names = heads_in(survey)
        if names:
            found.append(Elsewhere(near.asked, kind, names, near.given, near.path.is_relative_to(case.root)))
    return min(found, key=lambda f: not f.given, default=None)


def heads_in(survey: Survey) -> tuple[str, ...]:
    """Whole heads in a folder; the factors of a LoRA on a head are none."""
    inside = [n for n in heads_among(survey.entries) if not _LORA.search(n) and survey.entries[n].info.numel]
    beside = [f"{file}:{n}" for file, f in survey.beside.items() if file in _SIDECARS for n in f.tensors]
    return (*inside, *beside)


def heads_among(names: Iterable[str]) -> list[str]:
    """Names that look like a head's and lie in no numbered layer, where `v_head` is a part of attention (Funnel)."""
    return [n for n in head_like(names) if (m := _NUMBER.search(n)) is None or head_like([n[: m.end()]])]


def _training(case: Case, near: Near) -> Elsewhere:
    return Elsewhere(near.asked, "training", given=near.given, is_inside=near.path.is_relative_to(case.root))
