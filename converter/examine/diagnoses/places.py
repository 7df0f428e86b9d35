"""Where else a head may be: adapters, models and shards around a folder, by their headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from converter.converters.heads.detect import head_like
from converter.diagnostic import as_argument
from converter.examine.diagnoses.case import Case, Near
from converter.families.factors import factor_in_name
from converter.families.words import HEAD_FILES
from converter.sources.finding import sources
from converter.sources.survey import Survey

MOST_READ = 8
"""Folders around one whose headers are read for a head."""

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
    for near in [n for n in case.near if n.kind in ("model", "adapter")][:MOST_READ]:
        kind: Literal["adapter", "model"] = "adapter" if near.kind == "adapter" else "model"
        if (only and kind != only) or (kind == "model" and not near.given) or not _may_be_of_one_run(case, near):
            continue
        survey = sources()[near.source].survey(near.path)
        names = heads_in(survey)
        if names:
            found.append(Elsewhere(near.asked, kind, names, near.given, near.path.is_relative_to(case.root)))
    return min(found, key=lambda f: not f.given, default=None)


def _may_be_of_one_run(case: Case, near: Near) -> bool:
    """False for an adapter beside one that was trained over another base: its head is another model's."""
    if near.given or case.kind != "adapter":
        return True
    mine, other = (c.get("base_model_name_or_path") for c in (case.adapter_config, near.adapter_config))
    return mine == other


def heads_in(survey: Survey) -> tuple[str, ...]:
    """Whole heads in a folder; the factors of a LoRA on a head are none."""
    inside = [
        n for n in heads_among(survey.entries) if factor_in_name().match(n) is None and survey.entries[n].info.numel
    ]
    beside = [f"{file}:{n}" for file, f in survey.beside.items() if file in HEAD_FILES for n in f.tensors]
    return (*inside, *beside)


def heads_among(names: Iterable[str]) -> list[str]:
    """Names that look like a head's and lie in no numbered layer, where `v_head` is a part of attention (Funnel)."""
    return [n for n in head_like(names) if (m := _NUMBER.search(n)) is None or head_like([n[: m.end()]])]


def _training(case: Case, near: Near) -> Elsewhere:
    return Elsewhere(near.asked, "training", given=near.given, is_inside=near.path.is_relative_to(case.root))


def keeps(place: Near, module: str) -> bool:
    """True where a run's state holds the weight under a LoRA, frozen as it was."""
    stem = module.rpartition(".")[2]
    entries = sources()[place.source].survey(place.path).entries
    return any(n.endswith((f"{stem}.weight", f"{stem}.base_layer.weight")) and e.info.numel for n, e in entries.items())
