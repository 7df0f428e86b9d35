"""Whether the config.json that lies with Megatron's shards is that of their model."""

from __future__ import annotations

from collections.abc import Iterable

from converter.converters.gather.megatron import from_megatron
from converter.converters.gather.megatron_lora import is_lora
from converter.core.context import Context
from converter.errors import ConvertError
from converter.examine.diagnoses.case import Case, Finding, diagnosis
from converter.families.megatron.names import is_megatron
from converter.sources.finding import find_place, kind_of
from converter.sources.megatron.source import SOURCE

CODE = "megatron-config"


@diagnosis(CODE, "training")
def megatron_config(case: Case, context: Context) -> Iterable[Finding]:
    """The config.json that was found with Megatron's shards has other numbers of layers, heads, experts or rows than
    their tensors, or than the training script was called with. Fused matrices would be cut in the wrong places:
    `gather` takes the config of the model that training began with, as `--base`.
    """
    error = case.once(CODE, refusal)
    if error is not None:
        yield Finding(code=CODE, severity="error", text=error.what, next=error.next)


def refusal(case: Case) -> ConvertError | None:
    """Why a config does not fit; None where it fits, where there is none, and where that can't be told."""
    try:
        if kind_of(find_place(case.root, case.asked).folder) != SOURCE.name:
            return None
        found = SOURCE.open(case.root, asked=case.asked)
        if found.config and is_megatron(found.tensors) and not is_lora(found.tensors):
            from_megatron(found, Context())
    except ConvertError as error:
        return error if error.code == CODE else None
    return None
