"""The simulator: its divisions by hand, and what it says of a run that was measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulate import Machines, Work, memory, of_plan, of_size, seconds
from small_models import half_cast

GB = 1e9
PLENTY = Machines(nodes=1, cores=1000, read=1e15, write=1e15, shared=1e15)


def test_a_copy_waits_for_the_slower_side_of_its_disk() -> None:
    work = of_size(50 * GB, computed=0.0)  # 100 GB in 20 files
    assert seconds(work, Machines(1, 1000, 2 * GB, 1 * GB, 1e15)) == (102.0, "writing")
    assert seconds(work, Machines(1, 1000, 0.5 * GB, 1 * GB, 1e15)) == (202.0, "reading")


def test_machines_share_whole_files_and_one_file_system() -> None:
    work = of_size(50 * GB, computed=0.0)
    assert seconds(work, Machines(8, 1000, 1e15, 1 * GB, 1e15)) == (17.0, "writing")  # 3 files of 5 GB on the fullest
    assert seconds(work, Machines(64, 1000, 1e15, 1 * GB, 1e15)) == (7.0, "writing")  # 20 files: 44 machines idle
    assert seconds(work, Machines(64, 1000, 1e15, 1 * GB, 10 * GB)) == (22.0, "the shared file system")


def test_a_merge_of_1_5b_takes_what_it_took_within_a_half() -> None:
    """Two cores: 6.9 s on a machine of its own, 9.5 s of the processor; tests/benchmarks/README.md."""
    took, limit = seconds(of_size(1.544 * GB, computed=0.85), Machines(1, 2, 2 * GB, 1.2 * GB, 1e15))
    assert limit == "cores"
    assert took == pytest.approx(8.7, rel=0.05)
    assert 6.9 / 1.5 < took < 6.9 * 1.5


def test_memory_is_that_of_the_threads_and_not_of_the_model() -> None:
    assert memory(Machines(1, 2, 1, 1, 1)) == 350_000_000


def test_a_plan_is_what_it_writes_and_how_much_of_it_is_computed(tmp_path: Path) -> None:
    plan = half_cast(tmp_path)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.to_json()))
    work = of_plan(file)
    assert [f.size for f in work.files] == [s.size for s in plan.written]
    computed = 3 * 30 * 5 * 2  # three tensors of 30 by 5, cast to bf16
    assert work == Work(work.files, computed / plan.total_bytes)
    assert seconds(work, PLENTY)[0] == pytest.approx(2.0, abs=0.01)
