"""Time left is reckoned from what copies and computed tensors cost, each for itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import converter
from converter.recipe.pace import Pace
from converter.recipe.progress import Lines

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def test_a_slow_kind_that_is_still_to_come_is_not_taken_for_a_fast_one() -> None:
    """100 bytes are copied at 10 a second, 100 computed at 1 a second: after all copies and ten more, 90 s are left."""
    pace = Pace(200, {"merged": 100}, began=0.0)
    pace.note(10, "copied", worker=1, now=1.0)
    pace.note(90, "copied", worker=1, now=10.0)
    assert pace.left(10.0) == pytest.approx(10.0), "nothing computed was seen yet: the rate of all"
    pace.note(10, "merged", worker=1, now=20.0)
    assert pace.left(20.0) == pytest.approx(90.0)
    assert pace.done == 110
    assert pace.rate(20.0) == pytest.approx(5.5)


def test_workers_that_go_on_side_by_side_share_what_is_left() -> None:
    pace = Pace(1000, {"merged": 500}, began=0.0)
    for now in range(11):
        pace.note(10, "copied", worker=1, now=float(now))
        pace.note(5, "merged", worker=2, now=float(now))
    # copies: 390 bytes at 0.1 s each; merges: 445 at 0.2 s each; two workers
    assert pace.left(10.0) == pytest.approx((390 * 0.1 + 445 * 0.2) / 2)


def test_what_an_earlier_run_wrote_takes_no_more_time() -> None:
    pace = Pace(400, {"merged": 200}, began=0.0)
    pace.found(200)
    pace.note(50, "merged", worker=1, now=1.0)
    pace.note(50, "merged", worker=1, now=2.0)
    assert pace.done == 300
    assert pace.left(2.0) == pytest.approx(2.0), "100 bytes of copies are left, of which none was timed"


def test_all_is_written_and_no_time_is_left() -> None:
    pace = Pace(20, {}, began=0.0)
    assert pace.left(0.0) is None
    pace.note(10, "copied", worker=1, now=1.0)
    pace.note(10, "copied", worker=1, now=2.0)
    assert pace.left(2.0) == 0.0


def test_a_merge_says_which_tensors_are_computed(tmp_path: Path) -> None:
    told: list[Mapping[str, int]] = []

    class Asked(Lines):
        def computing(self, sizes: Mapping[str, int]) -> None:
            told.append(sizes)

    adapter, base = FIXTURES / "tiny-reward-adapter", FIXTURES / "tiny-qwen2-base"
    converter.merge_lora(adapter, tmp_path / "out", base=base, reporter=Asked(lambda text: None))
    merged = [name for name in converter.open(adapter) if ".lora_A." in name]
    (sizes,) = told
    assert len(sizes) == len(merged) == 14
    written = converter.open(tmp_path / "out")
    assert sizes == {name: written[name].info.nbytes for name in sizes}
