"""`rlhf-convert convert`, `rm-to-critic` and `critic-to-rm`: one recipe, from whatever the source is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from converter.cli.run import folder as conversion
from converter.diagnostic import Again, Command, Next, Steps, as_argument
from converter.dialects.known import Target, target
from converter.dialects.spec import Role
from converter.errors import ConvertError
from converter.publish.outputs import as_loaders_take_it, goes_to_hub
from converter.recipe.recipe import SOURCE
from converter.recipe.verbs.convert import Found, find, lost_and_found, remap_recipe
from converter.recipe.verbs.run_state import for_role, with_recorded_base

if TYPE_CHECKING:
    from converter.cli.options import HeadFlags
    from converter.cli.run.planned import Written
    from converter.recipe.run import Prepared


def convert(src: str, out: str | None, to: str, role: Role, options: HeadFlags, verb: str = "convert") -> int:
    """Convert a model into the one that a trainer reads in a role."""
    aim = target(to, role)
    looked: list[str] = []
    found: Found | None = None

    def attempt(recorded: bool) -> int:
        assert found is not None
        places, said = lost_and_found(found, options.plain)
        looked[:] = said
        state = dataclasses.replace(found, recorded=recorded)
        return conversion.convert(
            remap_recipe(state, to, role, aim, options.plain, places, verb),
            out,
            options,
            input_lines=lambda prepared: input_lines(prepared, state),
            next_commands=lambda written: next_commands(written, aim, to, src, state, options),
        )

    try:
        found = find(src, options.plain)
        return with_recorded_base(attempt, given=found.kind != "training" or options.base is not None)
    except ConvertError as error:
        for_role(error, role)
        if error.code == "head-missing" and found is not None and found.kind == "training":
            fresh = Again(("--init-head", "zeros"))
            error.next = Steps("name the model of the run that has a head; for a fresh critic: ", fresh)
        if error.code == "head-base-lost" and looked and error.got is None:
            error.got = "looked: " + "; ".join(looked)
        raise


def input_lines(prepared: Prepared, found: Found) -> list[str]:
    """The screen's lines about the inputs."""
    from converter.cli import lines as report

    lines = []
    for name, checkpoint in prepared.opened.items():
        if checkpoint.origin.kind == "adapter":
            lines.append(report.adapter_line(checkpoint))
        else:
            label = "base" if found.kind == "adapter" and name == SOURCE else name.partition("-")[0]
            lines.append(report.base_line(label, checkpoint, recorded=name in prepared.recorded))
    lines += report.repaired_lines(prepared.checkpoint.repaired)
    return lines + ([report.line("", found.said)] if found.said else [])


def next_commands(written: Written, aim: Target, to: str, src: str, found: Found, options: HeadFlags) -> list[Next]:
    """The proof, the trainer's launch line, and what goes wrong with it although the files are right."""
    path = written.out if Path(written.out).is_absolute() else f"./{Path(written.out)}"
    if goes_to_hub(written.out):
        path = as_loaders_take_it(written.out)
    verify = [as_argument(written.out), "--for", to, "--role", aim.role]
    if found.part is None and not written.prepared.checkpoint.repaired:  # what was lost in SRC can't be compared with
        verify += ["--against", found.path if found.kind == "training" else src]
        base = options.base or _recorded(written)
        verify += ["--base", base] if base is not None else []
    commands: list[Next] = [Command("verify", tuple(verify))]
    if aim.serves.launch:
        commands.append(aim.serves.launch_line(path))
    return [*commands, *(f"# {trap}" for trap in aim.traps)]


def _recorded(written: Written) -> str | None:
    """The base that a run recorded, where it was used; an adapter's own is found again."""
    used = "base" in written.prepared.recorded
    return written.prepared.opened["base"].origin.asked if used else None
