"""Flags of `--to megatron`: over how many ranks, and for which of Megatron's classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from converter.recipe.options import ModulesChoice

PANEL = "With --to megatron"


@dataclass(frozen=True)
class MegatronFlags:
    """Flags of the verbs that write a head, for one trainer alone."""

    tp: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tensor-parallel ranks, for which the vocabulary is padded.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    pp: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Pipeline stages. torch_dist records them and loads on any; legacy is for them.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    ep: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Expert-parallel ranks, as --pp.", show_default=False, rich_help_panel=PANEL
        ),
    ] = None
    etp: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Ranks of an expert's matrices; default: as --tp.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
    modules: Annotated[
        ModulesChoice | None,
        typer.Option(
            help="With --layout legacy: the classes of Megatron that load it.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
