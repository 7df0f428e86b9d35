"""What `doctor` does: every fault of a folder, what proves it, and the command that fixes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.knobs import Where, optional

if TYPE_CHECKING:
    from converter.core.writer.reporter import Reporter
    from converter.examine.doctor import Report


def doctor(
    path: Where,
    *,
    base: Where | None = None,
    weights_from: Sequence[Where] = (),
    for_: str | None = None,
    with_actor: Where | None = None,
    ignore: Sequence[str] = (),
    deep: bool = False,
    launch: str | Path | None = None,
    resume_on: int | None = None,
    allow_name: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Report:
    """Every fault of a folder that a trainer left, the worst first; reads headers and configs only, unless `deep`.

    Args:
        path: a folder, or a name on the Hub.
        base: None: what is recorded.
        weights_from: where weights may be, too.
        for_: a trainer: what its loader does with the folder.
        with_actor: the actor that a critic trains with.
        ignore: codes to leave out.
        deep: read values too: NaN, zeros, heads that never moved.
        launch: a training script to check against the folder; never run.
        resume_on: a number of ranks: whether the run goes on with them, and what has to be done first.
        allow_name: patterns of names of your own classes that pickled files may mention.
        reporter: hears of values that are read, of each tensor.

    Raises:
        UsageError: nothing that can be examined has that name, or no trainer is known by it.
    """
    from converter.core.writer.reporter import Silent
    from converter.examine.doctor import DoctorRequest, examine

    with allowing(allow_name):
        return examine(
            DoctorRequest(
                str(path),
                base=optional(base),
                weights_from=tuple(map(str, weights_from)),
                target=for_,
                actor=optional(with_actor),
                ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
                deep=deep,
                launch=optional(launch),
                resume_on=resume_on,
                reporter=reporter or Silent(),
            )
        )
