"""`rlhf-convert reshard`."""

from __future__ import annotations

import functools

from converter.cli import lines as report
from converter.cli.options import Conversion as Flags
from converter.cli.run.folder import convert
from converter.cli.run.planned import load_commands
from converter.diagnostic import Command, Next, as_argument
from converter.publish.outputs import as_loaders_take_it
from converter.recipe.recipe import SOURCE, Recipe
from converter.recipe.verbs import reshard as verb
from converter.recipe.verbs.conversion import Conversion
from converter.recipe.verbs.reshard import reshard_recipe


def reshard(
    src: str,
    out: str | None,
    options: Flags,
    *,
    dequantize: bool = False,
    to: str | None = None,
    under: str | None = None,
) -> int:
    """Rewrite a model folder."""
    own = functools.partial(verb.reshard, src, out, dequantize=dequantize, to=to, under=under)

    def recipe() -> Recipe:
        return reshard_recipe(src, options.plain, dequantize=dequantize, to=to, under=under)

    follow = load_commands if to is None else inspect_command
    convert(own, out, options, recipe=recipe, input_lines=input_lines, next_commands=follow)
    return 0


def inspect_command(written: Conversion) -> list[Next]:
    """The check of a distributed checkpoint, then what loads it."""
    path, under = as_loaders_take_it(str(written.out)), written.checkpoint.under
    nest = "".join(f'{{"{word}": ' for word in under) + "model.state_dict()" + "}" * len(under)
    loads = f'torch.distributed.checkpoint.load({nest}, checkpoint_id="{path}"), on any number of ranks'
    return [Command("inspect", (as_argument(str(written.out)),)), loads]


def input_lines(planned: Conversion) -> list[str]:
    """The screen's line about the source."""
    return [report.base_line("source", planned.prepared.opened[SOURCE], recorded=False)]
