"""A file that was reported as done is not written a second time, whatever a power cut leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from durability import Quiet, fast_folder, tree
from power_cuts import Recorder
from small_models import half_cast, written


class Cut(Exception):
    """Where the power fails."""


class UntilSecond(Quiet):
    """Stops once the second file is done."""

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        super().shard_done(file, size, resumed)
        if len(self.written) == 2:
            raise Cut


def test_files_that_were_done_before_a_power_cut_are_not_written_again() -> None:
    with fast_folder() as folder:
        plan = half_cast(folder)
        with Recorder(folder) as recorder, pytest.raises(Cut):
            written(plan, folder / "out", reporter=UntilSecond())
        disk = recorder.least()
        shutil.rmtree(folder / "out.partial")
        disk.lay_out(folder / "cut")
        (folder / "cut" / "out.partial").rename(folder / "out.partial")
        reporter = Quiet()
        written(plan, folder / "out", reporter=reporter)
        assert len(reporter.resumed) == 2
        assert len(reporter.written) == 1
        written(plan, Path(folder, "other"))
        assert tree(folder / "out") == tree(folder / "other")
        assert "out.partial" not in os.listdir(folder)
