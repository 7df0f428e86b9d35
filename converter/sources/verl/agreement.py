"""Are a verl run's files of one save? Ranks have the same learning rates, and their schedules say the same."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from converter.core.formats.torch_file import read_torch_file
from converter.errors import Refused
from converter.sources.same_settings import other_setting
from converter.sources.survey import file_names
from converter.sources.verl.files import RankFiles
from converter.sources.verl.shards import Ranks

_EXTRA = re.compile(r"extra_state_world_size_(\d{1,6})_rank_(\d{1,6})\.pt", re.ASCII)


def expect_same_groups(ranks: Ranks, order: Iterable[int]) -> None:
    """Ranks have the same learning rates and other settings.

    Raises:
        Refused: they don't (`verl-mixed`).
    """
    groups = {r: ranks.open(ranks.files.optimizers[r]).get("param_groups") for r in order}
    if (what := other_setting(groups)) is not None:
        raise ranks.refuse("verl-mixed", f"the optimizer files are not of one save: {what}")


def expect_one_schedule(ranks: Ranks) -> None:
    """All ranks' extra files have the same schedule.

    Raises:
        Refused: they don't (`verl-mixed`).
    """
    schedules = {r: _schedule(ranks, n) for r, n in sorted(extra_files(ranks.files).items())}
    if schedules and (what := other_setting(schedules)) is not None:
        raise ranks.refuse("verl-mixed", f"the extra files are not of one save: the schedule's {what}")


def _schedule(ranks: Ranks, file: str) -> Any:
    """A rank's; None of a file that isn't read, which whoever needs it refuses."""
    try:
        value = read_torch_file(ranks.files.folder / file, root=ranks.files.folder).value
    except Refused:
        return None
    return value.get("lr_scheduler") if isinstance(value, dict) else None


def extra_files(files: RankFiles) -> dict[int, str]:
    """Files of schedules and random states, by rank."""
    matches = {n: m for n in file_names(files.folder) if (m := _EXTRA.fullmatch(n)) is not None}
    return {int(m[2]): n for n, m in matches.items() if int(m[1]) == files.world}
