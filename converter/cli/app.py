"""The verbs, as Typer sees them: names, arguments, help. What a verb does is in a module imported when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from converter.cli.options import (
    Conversion,
    Display,
    EmitChoice,
    FailOnChoice,
    NumericsChoice,
    PartChoice,
    Reading,
    with_options,
)

ABOUT = (
    "Convert RLHF checkpoints: streaming, bounded in memory, verified.\n\n"
    "A bare `rlhf-convert PATH` inspects it; `rlhf-convert --version` prints the version."
)


def _new_app() -> typer.Typer:
    """An empty program. Plain text: for colours in help rich would have to be imported."""
    return typer.Typer(
        name="rlhf-convert",
        help=ABOUT,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


app = _new_app()
_alone: dict[str, typer.Typer] = {}


def app_of(verb: str) -> typer.Typer:
    """A program of this verb alone: a group would parse its own options first, for which Typer needs pydantic."""
    return _alone[verb]


def _verb(
    name: str, kind: type[Any], *, help: str, short_help: str, examples: tuple[str, str, str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a verb that takes the options of `kind`; its help ends with the examples."""
    # Backspace on a line of its own tells Typer not to re-wrap what follows.
    epilog = "\b\nExamples:\n" + "\n".join(f"  {each}" for each in examples)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parsed = with_options(kind)(function)
        _alone[name] = _new_app()
        for program in (app, _alone[name]):
            program.command(name, help=help, short_help=short_help, epilog=epilog)(parsed)
        return function

    return register


Out = Annotated[str | None, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]


@_verb(
    "merge-lora",
    Conversion,
    short_help="Merge LoRA adapters into their base model.",
    help="Merge one or more LoRA adapters into their base model. A reward-model adapter over a causal base becomes a "
    "reward model.",
    examples=(
        "rlhf-convert merge-lora ./my-adapter ./merged",
        "rlhf-convert merge-lora ./my-adapter ./merged --base Qwen/Qwen2.5-7B --dtype bf16",
        "rlhf-convert merge-lora ./style ./merged --adapter ./facts --weight 0.5 --weight 1",
    ),
)
def merge_lora(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder or Hub id.", show_default=False)],
    options: Conversion,
    out: Out = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Base model; default: the one the adapter records.", show_default=False),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="A", help="Another adapter. Repeatable.", show_default=False),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="W", help="Weight of each adapter, in order. Repeatable.", show_default=False),
    ] = None,
    numerics: Annotated[
        NumericsChoice, typer.Option(help="best: one rounding; peft: bit-identical to PEFT's merge.")
    ] = NumericsChoice.best,
    base_is_residual: Annotated[
        bool, typer.Option("--base-is-residual", help="BASE is the residual model that a PiSSA or OLoRA start saved.")
    ] = False,
) -> int:
    """`rlhf-convert merge-lora`."""
    from converter.cli.merge import Merge, merge

    asked = Merge(adapter, base, tuple(more or ()), tuple(weight or ()), numerics.value, base_is_residual)
    return merge(asked, options.target(out), options)


@_verb(
    "gather",
    Conversion,
    short_help="Make a model or an adapter of DeepSpeed's shards.",
    help="Make a model, or the LoRA adapter that was trained, of what DeepSpeed saved (ZeRO-1, 2 and 3): exact, in one "
    "pass, without DeepSpeed or a GPU.",
    examples=(
        "rlhf-convert gather ./run/checkpoint-500 ./model",
        "rlhf-convert gather ./run ./adapter --tag global_step500 --lora-alpha 16",
        "rlhf-convert gather ./run/global_step500 ./merged --emit merged --base Qwen/Qwen2.5-7B",
    ),
)
def gather(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder such as global_step500, its parent, or the run's.", show_default=False
        ),
    ],
    options: Conversion,
    out: Out = None,
    tag: Annotated[
        str | None,
        typer.Option(metavar="T", help="Which checkpoint; default: what `latest` says.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Base model, for config, tokenizer and weights that aren't saved.", show_default=False
        ),
    ] = None,
    master: Annotated[bool, typer.Option("--master", help="Keep the fp32 masters; the same as --dtype fp32.")] = False,
    emit: Annotated[
        EmitChoice | None,
        typer.Option(
            help="After LoRA: the adapter (default), the merged model, or both: the model in OUT, the adapter in "
            "OUT-adapter.",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        PartChoice | None,
        typer.Option(help="Which model, where a trainer's state holds several.", show_default=False),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(metavar="N", help="lora_alpha of training, where no config records it.", show_default=False),
    ] = None,
) -> int:
    """`rlhf-convert gather`."""
    from converter.cli.gather import Gathering, gather

    asked = Gathering(
        src,
        tag=tag,
        base=base,
        master=master,
        emit=None if emit is None else emit.value,
        lora_alpha=lora_alpha,
        part=None if part is None else part.value,
    )
    return gather(asked, options.target(out), options)


@_verb(
    "reshard",
    Conversion,
    short_help="Rewrite a model in other files or another dtype.",
    help="Rewrite a model folder in other files or another dtype; names, values and side files are kept.",
    examples=(
        "rlhf-convert reshard ./model ./model-2gb --max-shard-size 2GB",
        "rlhf-convert reshard ./model ./model-bf16 --dtype bf16",
        "rlhf-convert reshard ./model ./one-file --layout pack --max-shard-size 1TB",
    ),
)
def reshard(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model folder or Hub id.", show_default=False)],
    options: Conversion,
    out: Out = None,
) -> int:
    """`rlhf-convert reshard`."""
    from converter.cli.reshard import reshard

    return reshard(src, options.target(out), options)


@_verb(
    "inspect",
    Reading,
    short_help="Say what a folder holds; headers only.",
    help="Say what a folder holds, in one screen; reads headers only.",
    examples=(
        "rlhf-convert inspect ./my-adapter",
        "rlhf-convert inspect Qwen/Qwen2.5-7B",
        "rlhf-convert inspect ./model --json",
    ),
)
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, or Hub id in the cache.", show_default=False)],
    options: Reading,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Hub commit, branch or tag.", show_default=False)
    ] = None,
) -> int:
    """`rlhf-convert inspect`."""
    from converter.cli.inspection import inspect

    return inspect(path, revision, options)


@_verb(
    "doctor",
    Reading,
    short_help="Name every fault of a folder, and the command that mends it.",
    help="Name every fault of a folder that a trainer left: what proves it, whether it can be mended and from what, "
    "and the next command. Reads headers and configs only, unless --deep.",
    examples=(
        "rlhf-convert doctor ./my-reward-model",
        "rlhf-convert doctor ./my-adapter --base Qwen/Qwen2.5-7B --for openrlhf",
        "rlhf-convert doctor ./rm --weights-from ./run/checkpoint-500 --json",
    ),
)
def doctor(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, or Hub id in the cache.", show_default=False)],
    options: Reading,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Base model; default: what is recorded.", show_default=False)
    ] = None,
    weights_from: Annotated[
        list[str] | None,
        typer.Option(
            "--weights-from", metavar="DIR", help="Where weights may be, too. Repeatable.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="TRAINER", help="Say what this loader does with it.", show_default=False),
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option("--with-actor", metavar="DIR", help="The actor that it trains with.", show_default=False),
    ] = None,
    fail_on: Annotated[
        FailOnChoice, typer.Option("--fail-on", help="The least severity that makes the exit code 1.")
    ] = FailOnChoice.changes_numbers,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="CODE", help="Leave this one out. Repeatable.", show_default=False),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read values too: NaN, zeros, heads that never moved.")] = False,
) -> int:
    """`rlhf-convert doctor`."""
    from converter.cli.doctor import doctor
    from converter.doctor import Asked

    asked = Asked(path, base, tuple(weights_from or ()), target, actor, tuple(ignore or ()), deep)
    return doctor(asked, fail_on.value, options)


@_verb(
    "explain",
    Display,
    short_help="Say what a code, an error or a training log means.",
    help="Say what a code of doctor's, a pasted error or a training log means: which lines are harmless, which mean "
    "random weights, and what to do. `-` reads a log as it is written.",
    examples=(
        "rlhf-convert explain zero3-empty-tensors",
        "rlhf-convert explain ./train.log",
        "tail -f train.log | rlhf-convert explain - --fail-on error",
    ),
)
def explain(
    options: Display,
    subject: Annotated[
        str | None,
        typer.Argument(metavar="WHAT", help="Code, log file, `-`, or the error's text.", show_default=False),
    ] = None,
    fail_on: Annotated[
        FailOnChoice | None,
        typer.Option("--fail-on", help="Exit code 1 from this severity on, at once with `-`.", show_default=False),
    ] = None,
) -> int:
    """`rlhf-convert explain`."""
    from converter.cli.explain import explain

    return explain(subject, None if fail_on is None else fail_on.value, options)


@_verb(
    "run",
    Conversion,
    short_help="Run a recipe.",
    help="Run a recipe: a file, or the name of a shipped one (see `rlhf-convert list`).",
    examples=(
        "rlhf-convert run ./recipe.yaml ./out",
        "rlhf-convert run merge-reward-lora ./rm --input adapter=./my-adapter",
        "rlhf-convert run ./recipe.yaml ./out --dry-run",
    ),
)
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file or shipped name.", show_default=False)],
    options: Conversion,
    out: Out = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="NAME=PATH", help="Path of one of the recipe's inputs. Repeatable.", show_default=False
        ),
    ] = None,
) -> int:
    """`rlhf-convert run`."""
    from converter.cli.run_recipe import run

    return run(recipe, tuple(given or ()), options.target(out), options)


@_verb(
    "demo",
    Display,
    short_help="The whole story on small shipped checkpoints.",
    help="The whole story on small shipped checkpoints: what is there, merge, check, what changed. Under a minute.",
    examples=(
        "rlhf-convert demo",
        "rlhf-convert demo --out ./try-it",
        "rlhf-convert demo --quiet",
    ),
)
def demo(
    options: Display,
    out: Annotated[str, typer.Option("-o", "--out", metavar="OUT", help="Where to write.")] = "./rlhf-convert-demo",
) -> int:
    """`rlhf-convert demo`."""
    from converter.cli.demo import demo

    return demo(out, options)


@_verb(
    "list",
    Display,
    short_help="List plug-ins and shipped recipes.",
    help="List plug-ins (sources, converters, kernels) and shipped recipes.",
    examples=(
        "rlhf-convert list",
        "rlhf-convert list --json",
        "rlhf-convert list | grep converter",
    ),
)
def list_plug_ins(options: Display) -> int:
    """`rlhf-convert list`."""
    from converter.cli.environment import list_plug_ins

    return list_plug_ins(options)


@_verb(
    "env",
    Display,
    short_help="Print versions for a bug report.",
    help="Print versions for a bug report; no paths, names or secrets.",
    examples=(
        "rlhf-convert env",
        "rlhf-convert env --json",
        "rlhf-convert env > env.txt",
    ),
)
def env(options: Display) -> int:
    """`rlhf-convert env`."""
    from converter.cli.environment import env

    return env(options)
