"""`explain` reads logs of hundreds of megabytes: as fast as they are written, and in little memory."""

from __future__ import annotations

import random
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter.examine.explanations.lines import Follow, Keys, candidates
from converter.examine.explanations.log import MESSAGES, read

BLOCK = 1 << 20
KEYS = sorted({key.encode() for message in MESSAGES for key in message.keys})


def blocks(text: bytes, size: int = BLOCK) -> Iterator[bytes]:
    return (text[at : at + size] for at in range(0, len(text), size))


def metrics(size: int) -> bytes:
    """A trainer's own lines: the same words with other numbers."""
    rng, lines, length = random.Random(0), [], 0
    while length < size:
        lines.append(
            f"(WorkerDict pid={rng.randrange(9999)}, ip=10.0.0.7) 10:{rng.randrange(60)}:{rng.randrange(60)} INFO "
            f"step={len(lines)} loss={rng.random():.6f} kl={rng.random():.5e} grad_norm={rng.random():.4f}\n"
        )
        length += len(lines[-1])
    return "".join(lines).encode()


def answers(size: int) -> bytes:
    """What a model writes: lines that never come again."""
    rng, lines, length = random.Random(0), [], 0
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(20_000)]
    while length < size:
        lines.append(f"response: {' '.join(rng.choices(words, k=25))}\n")
        length += len(lines[-1])
    return "".join(lines).encode()


def seconds(text: bytes) -> float:
    began = time.process_time()
    assert not list(read(blocks(text)))
    return time.process_time() - began


@pytest.mark.parametrize(("make", "least"), [(metrics, 25), (answers, 10)])
def test_logs_are_read_at_many_megabytes_a_second(make: object, least: int) -> None:
    """The limits are a quarter of what an idle machine does, since tests run beside others."""
    text = make(6_000_000)  # type: ignore[operator]
    assert len(text) / 1e6 / min(seconds(text) for _ in range(2)) > least


def test_memory_does_not_grow_with_a_log_that_never_repeats() -> None:
    text = answers(2_000_000)
    list(read(blocks(text)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(read(block for _ in range(6) for block in blocks(text.translate(bytes.maketrans(b"ab", b"ba")))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.parametrize("size", [7, 1_000, BLOCK])
def test_every_line_with_a_key_is_found_wherever_the_key_stands(size: int) -> None:
    """Compared with a search for each key in each line."""
    rng = random.Random(size)
    lines = []
    for key in KEYS:
        before = "".join(rng.choices("abc :_.0123456789", k=rng.randint(0, 40))).encode()
        lines += [before + key + before, before[::-1]]
    text = b"\n".join(lines)
    want = [(n, line) for n, line in enumerate(lines, 1) if any(key in line for key in KEYS)]
    found = [(line.number, line.text) for line in candidates(blocks(text, size), Keys(KEYS), Follow())]
    assert [each for each in found if each in want] == want


def test_lines_are_found_among_those_that_repeat_and_those_that_do_not() -> None:
    error = b"ValueError: unknown zero stage 1\n"
    for around in (metrics(3_000_000), answers(3_000_000)):
        cut = around.rfind(b"\n", 0, len(around) // 2) + 1
        (seen,) = (s for s, is_new in read(blocks(around[:cut] + error + around[cut:])) if is_new)
        assert (seen.message.code, seen.line) == ("zero-stage-unknown", around.count(b"\n", 0, cut) + 1)


def test_of_a_large_file_it_is_told_how_far_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from converter.cli import main
    from converter.cli.tell import explain
    from converter.recipe import progress

    monkeypatch.setattr(explain, "_LARGE", 1_000_000)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    (tmp_path / "train.log").write_bytes(metrics(2_500_000))
    assert main(["explain", str(tmp_path / "train.log")]) == 0
    assert re.fullmatch(r"2.5 MB of 2.5 MB  \S+ \S+/s  reading", capsys.readouterr().err.splitlines()[-1])
    assert main(["explain", str(tmp_path / "train.log"), "-q"]) == 0
    assert capsys.readouterr().err == ""
