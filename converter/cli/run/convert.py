"""`rlhf-convert convert`, `rm-to-critic` and `critic-to-rm`: one recipe, from whatever the source is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from converter.cli import lines as report
from converter.cli.run import folder as conversion
from converter.diagnostic import Command, Next, as_argument
from converter.publish.outputs import as_loaders_take_it, goes_to_hub
from converter.recipe.recipe import SOURCE
from converter.recipe.verbs import convert as verb
from converter.recipe.verbs.convert import Converted, ConvertRequest, each_recipe

if TYPE_CHECKING:
    from converter.cli.options import HeadFlags
    from converter.recipe.recipe import Recipe


def convert(asked: ConvertRequest, out: str | None, options: HeadFlags) -> int:
    """Convert a model into the one that a trainer reads in a role."""
    verbs: dict[str, Callable[..., Converted]] = {
        "convert": functools.partial(verb.convert, role=asked.role),
        "rm-to-critic": verb.rm_to_critic,
        "critic-to-rm": verb.critic_to_rm,
    }

    def recipe() -> Recipe:
        return each_recipe(asked, options.plain, lambda _, recipe: recipe)

    own = functools.partial(verbs[asked.verb], asked.src, out, to=asked.to)
    conversion.convert(own, out, options, recipe=recipe, input_lines=input_lines, next_commands=next_commands)
    return 0


def input_lines(planned: Converted) -> list[str]:
    """The screen's lines about the inputs."""
    found, prepared = planned.found, planned.prepared
    lines = []
    for name, checkpoint in prepared.opened.items():
        if checkpoint.origin.kind == "adapter":
            lines.append(report.adapter_line(checkpoint))
        else:
            label = "base" if found.kind == "adapter" and name == SOURCE else name.partition("-")[0]
            lines.append(report.base_line(label, checkpoint, recorded=name in prepared.recorded))
    lines += report.repaired_lines(prepared.checkpoint.repaired)
    return lines + ([report.line("", found.said)] if found.said else [])


def next_commands(done: Converted) -> list[Next]:
    """The proof, the trainer's launch line, and what goes wrong with it although the files are right."""
    out, found, aim = str(done.out), done.found, done.request.aim
    path = out if Path(out).is_absolute() else f"./{Path(out)}"
    if goes_to_hub(out):
        path = as_loaders_take_it(out)
    if aim.serves.lays_out:
        return [Command("inspect", (as_argument(out),)), aim.serves.launch_line(path)]
    verify = [as_argument(out), "--for", done.request.to, "--role", aim.role]
    if found.part is None and not done.checkpoint.repaired:  # what was lost in SRC can't be compared with
        verify += ["--against", found.path if found.kind == "training" else done.request.src]
        base = getattr(done.options, "base", None) or _recorded(done)
        verify += ["--base", base] if base is not None else []
    commands: list[Next] = [Command("verify", tuple(verify))]
    if aim.serves.launch:
        commands.append(aim.serves.launch_line(path))
    return [*commands, *(f"# {trap}" for trap in aim.traps)]


def _recorded(done: Converted) -> str | None:
    """The base that a run recorded, where it was used; an adapter's own is found again."""
    used = "base" in done.prepared.recorded
    return done.prepared.opened["base"].origin.asked if used else None
