"""How far a run is: on a terminal and in a log, of what is written, examined and compared; a resumed run's own rate."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import converter
from converter.cli.progress import progress
from converter.cli.sink import Sink
from converter.recipe import progress as module

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
BASE = FIXTURES / "tiny-qwen2-base"
GIGABYTE = 1_000_000_000


class Heard:
    """Sums bytes by tensor."""

    def __init__(self) -> None:
        self.total = 0
        self.bytes: dict[str, int] = {}
        self.checks: list[str] = []

    def start(self, total_bytes: int, shards: int) -> None:
        self.total, self.bytes = total_bytes, {}

    def advance(self, count: int, tensor: str) -> None:
        self.bytes[tensor] = self.bytes.get(tensor, 0) + count

    def shard_done(self, file: str, size: int, resumed: bool) -> None: ...

    def checking(self, what: str) -> None:
        self.checks.append(what)


class Terminal:
    """A terminal in place of standard error, and what was drawn on it."""

    def __init__(self) -> None:
        self.primary, secondary = pty.openpty()
        self.file = os.fdopen(secondary, "w")
        os.set_blocking(self.primary, False)

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """In place of pytest's own, which takes its place again after a fixture."""
        before, sys.stderr = sys.stderr, self.file
        try:
            yield
        finally:
            sys.stderr = before

    def drawn(self) -> str:
        self.file.flush()
        found = b""
        while True:
            try:
                found += os.read(self.primary, 1 << 16)
            except BlockingIOError:
                return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found.decode())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    found = Terminal()
    yield found
    found.file.close()
    os.close(found.primary)


def wait_for(terminal: Terminal, pattern: str) -> str:
    """What was drawn until the pattern was in it."""
    found, until = "", time.monotonic() + 20
    while re.search(pattern, found) is None:
        assert time.monotonic() < until, found
        time.sleep(0.05)
        found += terminal.drawn()
    return found


def test_a_resumed_run_begins_at_what_is_there_and_its_rate_is_its_own(terminal: Terminal) -> None:
    with terminal.standing_in(), progress(Sink()) as reporter:
        reporter.start(4 * GIGABYTE, 4)
        for shard in "123":
            reporter.shard_done(shard, GIGABYTE, True)
        assert "3.0/4.0 GB ?" in wait_for(terminal, r"3\.0/4\.0 GB")
        time.sleep(0.2)
        reporter.advance(1_000_000, "model.embed_tokens.weight")
        time.sleep(0.2)
        reporter.advance(1_000_000, "model.embed_tokens.weight")
        found = wait_for(terminal, r"3\.0/4\.0 GB [\d.]+ [kM]B/s .*model\.embed_tokens\.weight")
        reporter.checking("what is written")
        wait_for(terminal, "checking what is written")
    assert "GB/s" not in found


def test_planning_that_takes_long_is_shown_and_gone_before_the_plan(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    with terminal.standing_in(), progress(Sink()) as reporter:
        wait_for(terminal, "reading headers")
        reporter.hide()
        terminal.drawn()
        time.sleep(0.3)
        assert terminal.drawn() == ""


def test_a_command_that_is_quick_draws_nothing(terminal: Terminal) -> None:
    with terminal.standing_in(), progress(Sink()):
        pass
    assert terminal.drawn() == ""


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_log_that_was_silent_for_long_says_how_far_a_file_is(
    seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", seconds)
    with progress(Sink()) as reporter:
        reporter.start(4 * GIGABYTE, 2)
        reporter.shard_done("one", GIGABYTE, True)
        reporter.advance(GIGABYTE, "lm_head.weight")
    first, *more = capsys.readouterr().err.splitlines()
    assert first == "1/2  one  1 GB  written by an earlier run"
    if seconds:
        assert more == []
    else:
        (line,) = more
        assert re.fullmatch(r"2 GB of 4 GB  \S+ \wB/s  \d+:\d\d left  lm_head\.weight", line)


def test_quiet_says_nothing_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    with progress(Sink(quiet=True)) as reporter:
        reporter.start(GIGABYTE, 1)
        reporter.advance(GIGABYTE, "lm_head.weight")
        reporter.shard_done("one", GIGABYTE, False)
    assert capsys.readouterr().err == ""


def test_doctor_tells_of_every_value_that_it_reads_and_of_none_without_deep() -> None:
    stored = converter.open(BASE)
    heard = Heard()
    converter.doctor(BASE, deep=True, reporter=heard)
    assert heard.bytes == {name: stored[name].info.nbytes for name in stored}
    assert heard.total == sum(heard.bytes.values())
    assert {"nonfinite", "zero-tensors", "suspicious-values"} <= set(heard.checks)
    without = Heard()
    converter.doctor(BASE, reporter=without)
    assert (without.total, without.bytes) == (0, {})


def test_verify_tells_of_every_tensor_that_it_compares(tmp_path: Path) -> None:
    converter.reshard(BASE, tmp_path / "out", max_shard_size="20MB")
    heard = Heard()
    found = converter.verify(tmp_path / "out", role="actor", against=BASE, reporter=heard)
    assert found.holds
    assert set(heard.bytes) == set(converter.open(BASE))
    assert heard.total == sum(heard.bytes.values())


def test_a_library_call_gets_lines_where_nothing_can_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with converter.progress() as reporter:
        converter.reshard(BASE, tmp_path / "out", reporter=reporter)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all(re.fullmatch(r"\d/2  model-0000\d-of-00002\.safetensors  \S+ \wB  \d+:\d\d", line) for line in told)
