"""The mean and deviation by which a reward model normalises its scores: in config.json, both or neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from converter.core.context import Context
from converter.core.files.names import MODEL_CONFIG
from converter.dialects.known import own_classes
from converter.examine.diagnoses.case import HERE, Case, Finding, diagnosis
from converter.examine.diagnoses.config import architecture
from converter.examine.diagnoses.heads import heads_here, wanted_head
from converter.text import show


@diagnosis("normaliser-broken", "model")
def normaliser_broken(case: Case, context: Context) -> Iterable[Finding]:
    """config.json of an OpenRLHF model has `mean` without `std`, or lists instead of numbers. OpenRLHF reads both as
    soon as there is a `mean` and stops: AttributeError, or TypeError.
    """
    if architecture(case) not in own_classes():
        return
    values = {k: case.config[k] for k in ("mean", "std") if k in case.config}
    odd = [k for k, v in values.items() if isinstance(v, bool) or not isinstance(v, int | float)]
    if values and (len(values) == 1 or odd):
        text = f"config.json has {' and '.join(values)}; OpenRLHF needs mean and std as one number each, or neither"
        yield Finding(
            code="normaliser-broken", severity="error", text=text, evidence=(MODEL_CONFIG,), recoverability=HERE
        )


@diagnosis("normaliser-lost", "model")
def normaliser_lost(case: Case, context: Context) -> Iterable[Finding]:
    """The adapter or reward model that this was made of says in its config.json by which mean and std scores are
    normalised; this one does not: a merge that copied the base's config loses them, and rewards have another scale.
    """
    if "mean" in case.config or not (heads_here(case) or wanted_head(case)):
        return
    for near in case.near:
        config: Mapping[str, object] = near.config
        if near.kind in ("model", "adapter") and "mean" in config and "std" in config and near.given:
            text = f"{show(near.asked)} normalises its scores (mean, std in config.json), and this model does not"
            yield Finding(
                code="normaliser-lost", severity="changes-numbers", text=text, recoverability=f"from {near.asked}"
            )
            return
