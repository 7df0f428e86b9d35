"""Flags of `--to megatron`: over how many ranks, and for which of Megatron's classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from converter.recipe.options import ModulesChoice

PANEL = "With --to megatron"


def _ranks(text: str) -> Any:
    return typer.Option(metavar="N", min=1, help=text, show_default=False, rich_help_panel=PANEL)


@dataclass(frozen=True)
class MegatronFlags:
    """Flags of the verbs that write a head, for one trainer alone."""

    tp: Annotated[int | None, _ranks("Tensor-parallel ranks, for which the vocabulary is padded.")] = None
    pp: Annotated[
        int | None, _ranks("Pipeline stages. torch_dist records them and loads on any; legacy is for them.")
    ] = None
    ep: Annotated[int | None, _ranks("Expert-parallel ranks, as --pp.")] = None
    etp: Annotated[int | None, _ranks("Ranks of an expert's matrices; default: as --tp.")] = None
    modules: Annotated[
        ModulesChoice | None,
        typer.Option(
            help="With --layout legacy: the classes of Megatron that load it.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None
