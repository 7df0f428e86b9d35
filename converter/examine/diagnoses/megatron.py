"""Whether Megatron's shards can be made a model of with the config.json that lies with them, or that of the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from converter.converters.gather.megatron import from_megatron
from converter.converters.gather.megatron_lora import is_lora, with_peft_names
from converter.converters.heads.whole import MISSHAPEN, MISSING, judge
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.diagnostic import Next, Steps
from converter.errors import ConvertError, Refused
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
        yield Finding(
            code=error.code,
            severity="changes-numbers" if error.consent else "error",
            text=error.what,
            next=_next(error, case),
        )


def _next(error: ConvertError, case: Case) -> Next | None:
    if error.code == CODE:
        other = case.command("gather", "--base", "BASE", out="gathered")
        return Steps(other, ", the model that training began with")
    if error.consent:
        return case.command("gather", "--allow", error.code, *base_option(case), out="gathered")
    return error.next


def refusal(case: Case) -> ConvertError | None:
    """Why `gather` refuses shards that are whole; None where it does not, and where there is no config to ask."""
    try:
        found = case.once("megatron-opened", opened)
        config = None if found is None else config_for(found, case)
        if found is None or not config:
            return None
        found = found.replace(config=config)
        if is_lora(found.tensors):
            with_peft_names(found, None, Context())
        elif is_megatron(found.tensors):
            made = from_megatron(found, Context(), None if case.base is None else case.base.checkpoint)
            return _other_class(made)
    except ConvertError as error:
        return error
    return None


def _other_class(made: Checkpoint) -> ConvertError | None:
    """What `gather` says of a model that lacks tensors of its class, or has them in other shapes."""
    judged = dataclasses.replace(judge(made), slices=None)
    wrong = next((c for c in (MISSING, MISSHAPEN) if judged.names(c)), None)
    return None if wrong is None else Refused(CODE, f"config.json is not of this model: {judged.words(wrong)}")


def opened(case: Case) -> Checkpoint | None:
    """Megatron's checkpoint in the folder; None where it is another trainer's, or can't be read."""
    try:
        if kind_of(find_place(case.root, case.asked).folder) != SOURCE.name:
            return None
        return SOURCE.open(case.root, asked=case.asked)
    except ConvertError:
        return None


def config_for(found: Checkpoint, case: Case) -> dict[str, object]:
    """The config that `gather` would go by: the run's own, else the base's."""
    return dict(found.config or ({} if case.base is None else case.base.config))


def base_option(case: Case) -> tuple[str, ...]:
    """`--base` where shards of Megatron have no config with them, or where one was given."""
    if case.base is not None:
        return ("--base", case.base.folder)
    found = case.once("megatron-opened", opened)
    return ("--base", "BASE") if found is not None and not found.config else ()
