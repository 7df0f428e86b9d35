"""Verbs that read and tell: names, arguments, help. What each does is in a module imported when it runs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from converter.cli.app import verb
from converter.cli.options import HUB, INPUT, OUTPUT, Allow, Device, Display, FailOnChoice, Reading, Report
from converter.cli.speaking import Speaking
from converter.cli.verbs.examining import Deep, Ignore
from converter.cli.verbs.heads import RoleChoice


@verb(
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
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, or owner/name on the Hub.", show_default=False)],
    options: Reading,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Hub commit, branch or tag.", show_default=False, rich_help_panel=HUB),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.", rich_help_panel=OUTPUT)] = False,
) -> int:
    """`rlhf-convert inspect`."""
    from converter.cli.tell.inspect import inspect

    return inspect(path, revision, options.sink, tensors=tensors, allow_name=options.allow_name or ())


@verb(
    "doctor",
    Reading,
    short_help="Name every fault of a folder, and the command that fixes it.",
    help="Name every fault of a folder that a trainer left: what proves it, whether it can be fixed and from what, "
    "and the next command. Reads headers and configs only, unless --deep.",
    examples=(
        "rlhf-convert doctor ./my-reward-model",
        "rlhf-convert doctor ./my-adapter --base Qwen/Qwen2.5-7B --for openrlhf",
        "rlhf-convert doctor ./rm --weights-from ./run/checkpoint-500 --json",
    ),
)
def doctor(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, or owner/name on the Hub.", show_default=False)],
    options: Reading,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Base model; default: what is recorded.", show_default=False, rich_help_panel=INPUT
        ),
    ] = None,
    weights_from: Annotated[
        list[str] | None,
        typer.Option(
            "--weights-from",
            metavar="DIR",
            help="Where weights may be, too. Repeatable.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="TRAINER", help="Say what this loader does with it.", show_default=False),
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option(
            "--with-actor",
            metavar="DIR",
            help="The actor that it trains with.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    fail_on: Annotated[
        FailOnChoice, typer.Option("--fail-on", help="The least severity that makes the exit code 1.")
    ] = FailOnChoice.changes_numbers,
    ignore: Ignore = None,
    deep: Deep = False,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="SCRIPT",
            help="Training script to check against it; never run.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    resume_on: Annotated[
        int | None,
        typer.Option(metavar="M", min=1, help="Say whether the run goes on with M ranks.", show_default=False),
    ] = None,
    report: Report = None,
) -> int:
    """`rlhf-convert doctor`."""
    from converter.cli.tell.doctor import doctor

    return doctor(
        path, fail_on.value, options, report_to=report, base=base, weights_from=weights_from or (), for_=target,
        with_actor=actor,
        ignore=ignore or (), deep=deep, launch=launch, resume_on=resume_on, allow_name=options.allow_name or (),
    )  # fmt: skip


@verb(
    "verify",
    Display,
    short_help="Prove that a trainer loads a folder as it was meant.",
    help="Prove that a trainer loads a folder and that it says what its source said: names, shapes, files, config and "
    "tokenizer against what the trainer's loader does with them; with --live by its own loader. Exit code 4 if not.",
    examples=(
        "rlhf-convert verify ./critic --for openrlhf --against ./rm",
        "rlhf-convert verify ./critic --for verl --live --python ~/envs/ppo/bin/python",
        "rlhf-convert verify ./rm --for trl --against ./my-adapter --base Qwen/Qwen2.5-7B --probe pairs.jsonl",
    ),
)
def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Model folder to verify.", show_default=False)],
    options: Display,
    trainer: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="TRAINER[@V]", help="Who is to load it; default: inferred from files.", show_default=False
        ),
    ] = None,
    role: Annotated[
        RoleChoice | None, typer.Option(help="What it is used as; default: what config.json says.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="What it was made of: a model, adapter or run.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="NAME", help="Trainer or dialect of SRC.", show_default=False, rich_help_panel=INPUT
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Base of SRC, if SRC is an adapter.", show_default=False, rich_help_panel=INPUT
        ),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Load it with the trainer's own code, on the CPU.")] = False,
    python: Annotated[
        str | None, typer.Option(metavar="PY", help="Python that has the trainer.", show_default=False)
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Preference pairs to score: prompt, chosen, rejected in JSON lines, a JSON list or Parquet; here or "
            "in a data set on the Hub (hf://datasets/OWNER/NAME/FILE).",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many pairs of --probe are scored, the first ones.")
    ] = 200,
    device: Device = "cpu",
    allow: Allow = None,
    report: Report = None,
) -> int:
    """`rlhf-convert verify`."""
    from converter.cli.tell.verify import verify

    return verify(
        folder, options, report_to=report, for_=trainer, role=None if role is None else role.value, against=against,
        from_=source,
        base=base, live=live, python=python, probe=probe, pairs=pairs, device=device, allow=allow or (),
    )  # fmt: skip


@verb(
    "explain",
    Speaking,
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
    options: Speaking,
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
    from converter.cli.tell.explain import explain

    return explain(subject, None if fail_on is None else fail_on.value, options)


@verb(
    "diff",
    Reading,
    short_help="Compare two checkpoints by value.",
    help="Compare two checkpoints by value, streamed: tensors, dtypes, config and side files, whatever the sharding. "
    "Exit code 0 where all is equal, else 1.",
    examples=(
        "rlhf-convert diff ./merged ./base",
        "rlhf-convert diff ./checkpoint-500 ./checkpoint-1000 -v",
        "rlhf-convert diff ./rm ./critic --ignore-prefix model. --json",
    ),
)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder, or owner/name on the Hub.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder, or owner/name on the Hub.", show_default=False)],
    options: Reading,
    ignore_prefix: Annotated[
        list[str] | None,
        typer.Option(metavar="P", help="Taken off names before they are paired. Repeatable.", show_default=False),
    ] = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Adam's moments of two runs, whatever their ranks; not the weights.")
    ] = False,
    report: Report = None,
) -> int:
    """`rlhf-convert diff`."""
    from converter.cli.tell.diff import diff

    return diff(
        a, b, options, report_to=report, ignore_prefix=ignore_prefix or (), allow_name=options.allow_name or (),
        optimizer=optimizer,
    )  # fmt: skip


@verb(
    "demo",
    Display,
    short_help="The whole story on small shipped checkpoints.",
    help="The whole story on small shipped checkpoints: what is there, merge, check, what changed. Under a minute.",
    examples=(
        "rlhf-convert demo",
        "rlhf-convert demo --out ./try-it",
        "rlhf-convert demo --push me/rlhf-convert-demo",
    ),
)
def demo(
    options: Display,
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="OUT", help="Where to write.", rich_help_panel=OUTPUT)
    ] = "./rlhf-convert-demo",
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="REPO",
            help="Push the result to owner/name, private.",
            show_default=False,
            rich_help_panel=HUB,
        ),
    ] = None,
) -> int:
    """`rlhf-convert demo`."""
    from converter.cli.tell.demo import demo_and_push

    return demo_and_push(out, push, options)


@verb(
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
    from converter.cli.tell.environment import list_plug_ins

    return list_plug_ins(options)


@verb(
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
    from converter.cli.tell.environment import env

    return env(options)


@verb(
    "schema",
    Display,
    short_help="Print the JSON schema of what a verb prints with --json.",
    help="Print the JSON schema (2020-12) of what a verb prints with --json, and of rlhf-convert.json; without a name, "
    "the names. Keys may be added without a new version; what a schema describes stays until the version rises.",
    examples=(
        "rlhf-convert schema",
        "rlhf-convert schema doctor > doctor.schema.json",
        "rlhf-convert schema receipt",
    ),
)
def schema(
    options: Display,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A verb, or receipt.", show_default=False)] = None,
) -> int:
    """`rlhf-convert schema`."""
    from converter.cli.tell.schema import schema

    return schema(name, options)


class ShellChoice(StrEnum):
    """Shells that complete."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


@verb(
    "completion",
    Display,
    short_help="Print a script that completes command lines in a shell.",
    help="Print a script that completes verbs, options, their choices, trainers, codes and folders. It holds all "
    "words: a shell that completes starts no Python. Print it anew after an update.",
    examples=(
        "rlhf-convert completion bash > ~/.local/share/bash-completion/completions/rlhf-convert",
        'rlhf-convert completion zsh > "${fpath[1]}/_rlhf-convert"',
        "rlhf-convert completion fish > ~/.config/fish/completions/rlhf-convert.fish",
    ),
)
def completion(
    options: Display, shell: Annotated[ShellChoice, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]
) -> int:
    """`rlhf-convert completion`."""
    from converter.cli.tell.completion import completion

    return completion(shell.value, options)
