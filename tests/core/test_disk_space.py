"""Space on the disk: what is needed is refused where it is one byte too much, and what is there already counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.core.writer.plan import Plan
from converter.core.writer.preflight import check_space, free_bytes
from converter.errors import Refused
from small_models import numbers, open_model, plan_of, save_model


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(open_model(save_model(tmp_path / "model", {"a": numbers(300, 40)})))


def test_a_disk_with_less_than_is_needed_is_refused_and_one_with_that_much_is_not(plan: Plan, tmp_path: Path) -> None:
    """What is meant for others is as large as the disk, but for a margin: files of others come and go meanwhile."""
    margin, room = 200_000_000, free_bytes(tmp_path / "out")
    if room < 3 * margin:
        pytest.skip("the disk is too full to tell")
    check_space(plan, tmp_path / "out", beside=room - margin)
    with pytest.raises(Refused, match="can't hold") as caught:
        check_space(plan, tmp_path / "out", beside=room + margin)
    assert caught.value.code == "no-space"
    check_space(plan, tmp_path / "out", beside=room + margin, already=2 * margin)
