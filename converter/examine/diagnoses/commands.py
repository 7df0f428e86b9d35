"""Commands that several diagnoses print: to a trainer's folder, and from shards at hand."""

from __future__ import annotations

from converter.diagnostic import Command
from converter.examine.diagnoses.case import Case
from converter.examine.diagnoses.config import architecture


def convert_command(case: Case, role: str, to: str | None = None, *more: str) -> Command:
    """The command that makes a folder for a trainer: the one that was named, else TRL."""
    aim = ("--to", to or case.target or "trl", "--role", role)
    return case.command("convert", *aim, *more, *_base_option(case), out="converted")


def _base_option(case: Case) -> tuple[str, ...]:
    """`--base`, where an adapter does not record its base, or another one was given."""
    if case.kind != "adapter":
        return ()
    recorded = case.adapter_config.get("base_model_name_or_path")
    if case.base is not None and case.base.asked != recorded:
        return ("--base", case.base.folder)
    return () if recorded else ("--base", "BASE")


def filling_command(case: Case) -> Command | None:
    """The command that takes what is lost from shards at hand: in one pass to the trainer that was named, if one was.

    Shards in the folder itself are found without being named.
    """
    places = case.training_near()
    if not places:
        return None
    inside = not places[0].given and places[0].path.is_relative_to(case.root)
    more = () if inside else ("--weights-from", places[0].argument)
    if case.trainer:
        return convert_command(case, role_word(case), None, *more)
    return case.repair(*more)


def role_word(case: Case) -> str:
    """What the folder's class says it is."""
    return "critic" if architecture(case).endswith(("CriticModel", "ForTokenClassification")) else "reward"
