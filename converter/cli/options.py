"""Options that several verbs share, each described once, in users' own words."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from converter.cli.megatron_flags import PANEL as MEGATRON
from converter.cli.megatron_flags import MegatronFlags
from converter.cli.sink import Sink
from converter.errors import UsageError
from converter.recipe.options import (
    BiasChoice,
    HeadOptions,
    InitChoice,
    LayoutChoice,
    NormaliserChoice,
    PartChoice,
    WriteOptions,
)
from converter.sources.hub import patience

INPUT, OUTPUT, RESOURCES, HUB, CONSENT = _PANELS = ("Input", "Output", "Resources", "Hub", "Consent")
PANELS = (*_PANELS, MEGATRON)
"""Panels of `--help`, in their order. An option without one is the verb's own and stands before them."""

_WHOLE = "Make a quantised model's weights whole first, as the vendor's own code does, to the bit."
Dequantize = Annotated[bool, typer.Option("--dequantize", help=_WHOLE, rich_help_panel=INPUT)]

_WHERE = "Where to compute: cpu, cuda, cuda:N, or auto for a GPU where there is one."
Device = Annotated[str, typer.Option(metavar="DEVICE", help=_WHERE, rich_help_panel=RESOURCES)]

if TYPE_CHECKING:
    from converter.core.writer.reporter import Reporter


class FailOnChoice(StrEnum):
    """How bad a finding must be for exit code 1."""

    error = "error"
    changes_numbers = "changes-numbers"
    cosmetic = "cosmetic"


Token = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Hub token; default: as huggingface_hub finds it.",
        show_default=False,
        rich_help_panel=HUB,
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CODE",
        help="Go on past a refusal that printed CODE. Repeatable.",
        show_default=False,
        rich_help_panel=CONSENT,
    ),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="lora_alpha of training, where no config records it.",
        show_default=False,
        rich_help_panel=INPUT,
    ),
]


@dataclass(frozen=True)
class Display:
    """How a verb shows what it has to say."""

    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, errors included.", rich_help_panel=OUTPUT)
    ] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more.", rich_help_panel=OUTPUT)] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.", rich_help_panel=OUTPUT)] = False

    @property
    def sink(self) -> Sink:
        """Where the output goes."""
        sink = Sink(self.as_json, self.quiet, self.verbose)
        patience.listener = sink.tell
        return sink


_OF_EVERY_VERB = frozenset(f.name for f in dataclasses.fields(Display))


@dataclass(frozen=True)
class Reading(Display):
    """How a verb reads what trainers saved."""

    allow_name: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-name",
            metavar="REGEX",
            help="Names of your own trainer's classes that pickled files may mention; none is imported. Repeatable.",
            show_default=False,
            rich_help_panel=CONSENT,
        ),
    ] = None


@dataclass(frozen=True)
class Fetch:
    """How inputs are found on the Hub."""

    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REV",
            help="Hub commit, branch or tag of the first argument.",
            show_default=False,
            rich_help_panel=HUB,
        ),
    ] = None
    token: Token = None


Report = Annotated[
    str | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write a page (.html) or a card (.png) of what was done; needs the extra `report`.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True)
class Conversion(Fetch, Reading):
    """Everything that verbs which write a checkpoint share."""

    out_option: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="Where to write, instead of the argument.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and plan everything, write nothing.", rich_help_panel=OUTPUT)
    ] = False
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe and stop.", rich_help_panel=OUTPUT)
    ] = False
    jobs: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            metavar="N",
            min=1,
            help="Threads; default: one a core.",
            show_default=False,
            rich_help_panel=RESOURCES,
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory to stay under, as 2GB.", show_default=False, rich_help_panel=RESOURCES
        ),
    ] = None
    device: Device = "cpu"
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Cast to bf16, fp16 or fp32; default: each tensor's own.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest output file, as 5GB.", show_default=False, rich_help_panel=OUTPUT),
    ] = None
    layout: Annotated[
        LayoutChoice | None,
        typer.Option(
            help="Keep the source's files, or fill new ones; default: auto. With --to megatron: its format.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    link_unchanged: Annotated[
        bool,
        typer.Option(
            "--link-unchanged",
            help="Make symbolic links to the source's files that stay as they are; the source has to be kept.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that this tool made.", rich_help_panel=CONSENT)
    ] = False
    allow: Allow = None
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Carry .py files of the source along.", rich_help_panel=CONSENT)
    ] = False
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over instead of resuming OUT.partial.", rich_help_panel=OUTPUT)
    ] = False
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip reading the output back.", rich_help_panel=OUTPUT)
    ] = False
    report: Report = None
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="REPO",
            help="Push OUT to owner/name afterwards.",
            show_default=False,
            rich_help_panel=HUB,
        ),
    ] = None
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository on the Hub public.", rich_help_panel=HUB)
    ] = False

    @property
    def plain(self) -> WriteOptions:
        """What the verb itself takes, without the screen."""
        return WriteOptions(**self._plain_values())

    def _plain_values(self) -> dict[str, Any]:
        """Values of the fields that `WriteOptions` has, under its names."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(WriteOptions) if hasattr(self, f.name)}
        lists = {"allow": tuple(self.allow or ()), "allow_name": tuple(self.allow_name or ())}
        return values | lists | {"resume": not self.no_resume, "verify": not self.no_verify}

    def knobs(self, reporter: Reporter, on_plan: Callable[[Any], None]) -> dict[str, Any]:
        """The keyword arguments that the functions of `converter` take for these flags."""
        values = dataclasses.asdict(self.plain)
        if "source" in values:
            values["from_"] = values.pop("source")
        return values | {"dry_run": self.dry_run, "reporter": reporter, "on_plan": on_plan}

    def target(self, argument: str | None) -> str | None:
        """The output folder, from the argument or from `--out`.

        Raises:
            UsageError: both are given and differ (`usage`).
        """
        if argument and self.out_option and argument != self.out_option:
            raise UsageError("usage", f"two outputs: {argument} and --out {self.out_option}; give one")
        return argument or self.out_option


def with_options(kind: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of a dataclass: each field becomes an option, the command gets one `options` value.

    The command itself doesn't run while Typer parses: what it would do is returned, and `main` runs it.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True)
        hints = get_type_hints(kind, include_extras=True)
        # Those of every verb last: what a reader looks for is what this verb adds.
        fields = sorted(dataclasses.fields(kind), key=lambda f: f.name in _OF_EVERY_VERB)
        shared = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields
        ]
        arguments = [p for p in own.parameters.values() if p.name != "options"]

        @functools.wraps(command)
        def parsed(**values: Any) -> Callable[[], int]:
            options = kind(**{f.name: values.pop(f.name) for f in fields})
            return functools.partial(command, **values, options=options)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in arguments] + shared
        parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        parsed.__annotations__ = {p.name: p.annotation for p in parameters}
        return parsed

    return decorate


@dataclass(frozen=True)
class HeadFlags(Conversion, MegatronFlags):
    """Options of the verbs that write a head."""

    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME",
            help="Trainer or dialect of SRC; default: inferred from its files.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The linear layer that is SRC's head, as reward_head; default: inferred from its names.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Base of an adapter, or where a missing lm_head is; default: as recorded.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None
    weights_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Where tensors that SRC has lost may still be. Repeatable.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None
    part: Annotated[
        PartChoice | None,
        typer.Option(
            help="Which model, where SRC is a trainer's state that holds several.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None
    tag: Annotated[
        str | None,
        typer.Option(
            metavar="T", help="Which checkpoint of a run; default: `latest`.", show_default=False, rich_help_panel=INPUT
        ),
    ] = None
    lora_alpha: LoraAlpha = None
    dequantize: Dequantize = False
    bias: Annotated[BiasChoice, typer.Option(help="A constant of the head that the target has no place for.")] = (
        BiasChoice.refuse
    )
    normaliser: Annotated[NormaliserChoice, typer.Option(help="mean and std: folded into the head, or left out.")] = (
        NormaliserChoice.fold
    )
    label: Annotated[
        int | None, typer.Option(metavar="N", help="Take this row of a head with several.", show_default=False)
    ] = None
    label_weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="Sum the rows of a head with these weights, as -1,1.", show_default=False),
    ] = None
    init_head: Annotated[
        InitChoice | None,
        typer.Option(help="A fresh head where SRC has none; it has learnt nothing.", show_default=False),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of --init-head normal.")] = 0

    @property
    def plain(self) -> HeadOptions:
        """What the verb itself takes, without the screen."""
        own = {f.name for f in dataclasses.fields(HeadOptions)} - {f.name for f in dataclasses.fields(WriteOptions)}
        values = self._plain_values() | {name: getattr(self, name) for name in own}
        return HeadOptions(**values | {"weights_from": tuple(self.weights_from or ())})
