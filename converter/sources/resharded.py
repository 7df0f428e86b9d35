"""A trainer's state planned for another number of ranks: the plan, and what a screen says of it."""

from __future__ import annotations

from dataclasses import dataclass

from converter.core.writer.plan import Plan


@dataclass(frozen=True)
class Resharded:
    """A plan, and what a screen says of it.

    Attributes:
        tag: the name of the checkpoint, which the run's tracker names.
        stage: of ZeRO; None for other trainers.
        format_before, format_after: as `ZeRO-3, 4 ranks`.
        batch: what keeps the run's global batch on the new number of ranks, where its settings say it.
        said: what was chosen, found or left behind.
        goes_on: how its trainer is told to go on from there; `{out}` is the output's path.
        digest: sha256 over what the files read say.
    """

    plan: Plan
    tag: str
    stage: int | None
    ranks_before: int
    ranks: int
    format_before: str
    format_after: str
    batch: str | None
    said: tuple[str, ...]
    goes_on: str
    digest: str
