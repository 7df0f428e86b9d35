"""A plug-in that can't be imported is named in doctor's report, and `list` says the same of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter.dialects.known import dialects
from converter.examine.doctor import DoctorRequest, diagnoses, examine
from converter.sources.finding import sources
from oracle.command import run

POINTS = """[rlhf_convert.diagnoses]
strange = strange_module:DIAGNOSIS
[rlhf_convert.sources]
odd = odd_source:SOURCE
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package whose diagnosis raises on import, and whose source's module is not there."""
    home = tmp_path / "site" / "strange-0.1.dist-info"
    home.mkdir(parents=True)
    (home / "entry_points.txt").write_text(POINTS)
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 0.1\n")
    (home.parent / "strange_module.py").write_text('raise RuntimeError("first line\\nsecond line")\n')
    monkeypatch.syspath_prepend(str(home.parent))
    for known in (diagnoses, sources, dialects):
        known.cache_clear()
    yield
    for known in (diagnoses, sources, dialects):
        known.cache_clear()


@pytest.mark.usefixtures("strangers")
def test_doctor_names_each_plug_in_that_it_had_to_leave_out(causal: Path) -> None:
    found = examine(DoctorRequest(str(causal))).findings
    assert [(f.code, f.severity) for f in found] == [("plug-in-broken", "cosmetic")] * 2
    assert found[0].text == "the diagnosis `strange` of strange 0.1 is left out: first line\\nsecond line"
    assert found[1].text == "the source `odd` of strange 0.1 is left out: No module named 'odd_source'"
    screen = run("doctor", causal)
    assert screen.code == 0 and "is left out" in screen.text and "Traceback" not in screen.text


@pytest.mark.usefixtures("strangers")
def test_list_says_what_importing_it_says() -> None:
    ran = run("list")
    assert ran.code == 1
    assert "strange strange 0.1 BROKEN: first line\\nsecond line" in ran.text


def test_without_strangers_nothing_is_left_out(causal: Path) -> None:
    assert "strange_module" not in sys.modules
    assert examine(DoctorRequest(str(causal))).findings == ()
