"""What is said while the Hub is asked again: one line, without the addresses that the client's own lines quote."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter.sources.hub import patience
from fake_hub import FakeHub, Fault, running
from hub_here import client_of, run
from places import REPOSITORY

MODEL = REPOSITORY / "fixtures" / "tiny-qwen2-base"
CLIENT = logging.getLogger("huggingface_hub.utils._http")


@pytest.fixture(autouse=True)
def nothing_told_yet() -> Iterator[None]:
    patience._told.clear()
    yield
    patience._told.clear()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with running(FakeHub()) as server, client_of(server, tmp_path / "home"):
        yield server


@pytest.mark.parametrize(("kind", "said"), [("500", "the Hub answers 500"), ("drop", "the Hub does not answer")])
def test_many_tries_of_the_client_are_one_line(hub: FakeHub, kind: str, said: str) -> None:
    hub.faults = [Fault("^PUT", kind, 4)]
    ran = run("push", MODEL, "me/model")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count(f"{said}: trying again, for a minute at most\n") == 1
    assert "PUT" not in ran.stderr
    assert "thrown" not in ran.stderr


def test_quiet_is_quiet(hub: FakeHub) -> None:
    hub.faults = [Fault("^PUT", "500", 4)]
    ran = run("push", MODEL, "me/model", "-q")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_only_what_the_client_says_of_its_tries_is_kept_back_and_only_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    passed: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: passed.append(record.getMessage()))
    monkeypatch.setattr(CLIENT, "handlers", [handler])
    monkeypatch.setattr(patience, "listener", told.append)
    with patience.heard():
        with patience.heard():
            CLIENT.warning("HTTP Error 503 thrown while requesting PUT https://s3/x?X-Amz-Signature=abc")
        CLIENT.warning("'The read operation timed out' thrown while requesting GET https://s3/x")
        CLIENT.warning("Rate limited. Waiting 241.0s before retry [Retry 1/5].")
        CLIENT.warning("Rate limited. Waiting 1.0s before retry [Retry 2/5].")
        CLIENT.warning("Retrying in 8s [Retry 5/5].")
        CLIENT.warning("something else")
    CLIENT.warning("Retrying in 1s [Retry 1/5].")
    assert passed == ["something else", "Retrying in 1s [Retry 1/5]."]
    assert told == [
        "the Hub answers 503: trying again, for a minute at most",
        "the Hub does not answer: trying again, for a minute at most",
        "the Hub asks to wait 241 s",
    ]


def test_a_try_that_was_at_work_does_not_use_up_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = [0.0], []
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    quick = patience.Patience()
    assert [quick.again(OSError()) for _ in range(6)] == [True] * 5 + [False]
    assert waited == [1, 2, 4, 8, 8]
    slow = patience.Patience()
    now[0] += 25
    assert slow.again(OSError())
    now[0] += 25
    assert not slow.again(OSError())
    at_work = patience.Patience()
    for _ in range(3):
        now[0] += 3600
        assert at_work.again(OSError())
