"""A run that is killed, interrupted, out of space, or whose input changes under it: nothing false is published, the
inputs stay as they were, and the same command again finishes with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from converter.core.writer.write import write
from converter.errors import Refused
from durability import Call, Quiet, copy_inputs, fast_folder, merge_plan, telling, tree
from forked import Ended, Server

COMMAND = ("merge-lora", "adapter", "out", "--base", "base", "--no-verify")
OVERWRITE = (*COMMAND, "--overwrite")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> Iterator[dict[str, str]]:
    """What the command makes."""
    with fast_folder() as folder:
        copy_inputs(folder)
        assert server.run(*COMMAND, folder=folder).code == 0
        yield tree(folder / "out")


class Bench:
    """A folder with the inputs, in which command lines run."""

    def __init__(self, server: Server, folder: Path, expected: dict[str, str]) -> None:
        self.server, self.folder, self.expected = server, folder, expected
        copy_inputs(folder)
        self.inputs = self._inputs()
        self.out = folder / "out"

    def _inputs(self) -> dict[str, dict[str, str]]:
        return {n: tree(self.folder / n) for n in ("base", "adapter")}

    def run(self, *command: object, **how: Any) -> Ended:
        return self.server.run(*command, folder=self.folder, **how)

    def is_absent_or(self, *whole: dict[str, str]) -> bool:
        return not os.path.lexists(self.out) or tree(self.out) in whole

    def finishes(self, *command: object) -> None:
        """The same command again: the same bytes, nothing beside them, the inputs as they were."""
        if not ("--overwrite" not in command and self.out.exists()):
            ran = self.run(*command)
            assert ran.code == 0, ran.err
        assert tree(self.out) == self.expected
        assert sorted(os.listdir(self.folder)) == ["adapter", "base", "out"]
        assert self._inputs() == self.inputs

    def clear(self) -> None:
        for name in set(os.listdir(self.folder)) - {"base", "adapter"}:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def bench(server: Server, expected: dict[str, str]) -> Iterator[Bench]:
    with fast_folder() as folder:
        yield Bench(server, folder, expected)


# kill -9


def test_killed_at_a_few_random_calls_the_same_command_finishes(bench: Bench) -> None:
    killed_at_random_calls(bench, 6)


@pytest.mark.slow
def test_killed_at_every_call_the_same_command_finishes(bench: Bench) -> None:
    calls = 0
    while bench.run(*COMMAND, die_at=calls).reached:
        assert bench.is_absent_or(bench.expected)
        bench.finishes(*COMMAND)
        bench.clear()
        calls += 1
    assert calls > 100


def killed_at_random_calls(bench: Bench, kills: int) -> None:
    rng = random.Random(7)
    done = 0
    while done < kills:
        ended = bench.run(*COMMAND, die_at=rng.randrange(160))
        assert ended.code in (0, 9), ended.err
        assert bench.is_absent_or(bench.expected)
        done += ended.reached
        if rng.random() < 0.5 or bench.out.exists():  # else the next one is killed while it resumes
            bench.finishes(*COMMAND)
            bench.clear()
    bench.finishes(*COMMAND)


def test_killed_at_a_few_random_moments_the_same_command_finishes(bench: Bench) -> None:
    killed_at_random_moments(bench, 6)


@pytest.mark.slow
def test_killed_at_two_hundred_random_moments_the_same_command_finishes(bench: Bench) -> None:
    killed_at_random_moments(bench, 200)


def killed_at_random_moments(bench: Bench, kills: int) -> None:
    usual = bench.run(*COMMAND).seconds
    bench.clear()
    rng = random.Random()  # moments are random whatever the seed
    done = 0
    for _ in range(kills * 5):
        ended = bench.run(*COMMAND, kill=(signal.SIGKILL, rng.uniform(0, usual)))
        assert ended.code in (0, -signal.SIGKILL), ended.err
        assert bench.is_absent_or(bench.expected)
        done += ended.code != 0
        if bench.out.exists():
            bench.clear()
        if done == kills:
            break
    assert done == kills
    bench.finishes(*COMMAND)


def test_the_installed_program_killed_while_it_writes_finishes_when_it_is_run_again(bench: Bench) -> None:
    program = [str(Path(sys.executable).with_name("rlhf-convert")), *COMMAND]
    running = subprocess.Popen(program, cwd=bench.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (bench.folder / "out.partial").exists():
        time.sleep(0.001)
    running.kill()
    running.wait()
    assert bench.is_absent_or(bench.expected)
    bench.finishes(*COMMAND)


def former(bench: Bench) -> dict[str, str]:
    """Another output of ours, which `--overwrite` may replace."""
    assert bench.run("reshard", "base", "out", "--max-shard-size", "20KB").code == 0
    return tree(bench.out)


def test_killed_at_the_telling_calls_of_a_publication_the_same_command_finishes(bench: Bench) -> None:
    """The first and the last of each kind, among them every rename."""
    killed_while_it_is_published(bench, telling)


@pytest.mark.slow
def test_killed_at_each_call_of_a_publication_the_same_command_finishes(bench: Bench) -> None:
    killed_while_it_is_published(bench, list)


def killed_while_it_is_published(bench: Bench, choose: Callable[[Sequence[Call]], list[Call]]) -> None:
    old = former(bench)
    keep = bench.folder.parent / f"{bench.folder.name}-former"
    shutil.copytree(bench.out, keep)
    try:
        calls = bench.run(*OVERWRITE).calls
        written = max(n for n, call in enumerate(calls) if call.path == "/out.partial/rlhf-convert.json.tmp")
        absent = 0
        for call in choose(calls[written:]):
            bench.clear()
            shutil.copytree(keep, bench.out)
            assert bench.run(*OVERWRITE, die_at=call).reached, call
            assert bench.is_absent_or(old, bench.expected), call
            if not bench.out.exists():
                absent += 1
                assert tree(bench.folder / "out.old") == old
            bench.finishes(*OVERWRITE)
        assert absent > 0, "no kill hit the moment between the two renames"
    finally:
        shutil.rmtree(keep)


def test_an_interrupted_overwrite_that_is_not_wished_for_any_more_gives_the_old_output_back(bench: Bench) -> None:
    old = former(bench)
    for name in ("out.old", "out.partial"):
        shutil.copytree(bench.out, bench.folder / name)
    inode = (bench.folder / "out.old").stat().st_ino
    (bench.folder / "out.replacing").write_text(f"replaces inode {inode}\n")
    shutil.rmtree(bench.out)
    shutil.rmtree(bench.folder / "out.partial")
    ended = bench.run(*COMMAND)
    assert ended.code == 3
    assert "output-exists" in ended.err
    assert tree(bench.out) == old
    assert sorted(os.listdir(bench.folder)) == ["adapter", "base", "out"]


# Signals


@pytest.mark.signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_random_moments_ends_the_run_with_its_code_and_one_line(
    bench: Bench, number: signal.Signals, code: int
) -> None:
    usual = bench.run(*COMMAND).seconds
    bench.clear()
    stopped = 0
    for step in range(60):
        ended = bench.run(*COMMAND, kill=(number, usual * (step % 8 + 1) / 9))
        assert ended.code in (0, code, -number), ended  # killed: before there was anything to interrupt
        assert "Traceback" not in ended.err
        assert bench.is_absent_or(bench.expected)
        if ended.code == code:
            assert ended.err.count("STOPPED interrupted") == 1, ended
            stopped += 1
        bench.finishes(*COMMAND)
        bench.clear()
        if stopped == 6:
            return
    pytest.fail(f"{stopped} of 60 runs were hit")


# No space


def test_a_file_that_may_not_grow_is_an_error_and_the_same_command_finishes_later(bench: Bench) -> None:
    ended = bench.run(*COMMAND, file_size=100_000)
    assert ended.code == 3
    assert "File too large; nothing was published" in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert not bench.out.exists()
    bench.finishes(*COMMAND)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.root
def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(bench: Bench, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(900_000))
    ended = bench.run("merge-lora", "adapter", small_disk / "out", "--base", "base")
    assert ended.code == 3
    assert "no-space" in ended.err
    assert os.listdir(small_disk) == ["ballast"]


@pytest.mark.root
@pytest.mark.parametrize("room", [0, 50_000, 150_000, 200_000])
def test_a_disk_that_fills_up_meanwhile_is_an_error_and_the_same_call_goes_on(
    small_disk: Path, tmp_path: Path, room: int
) -> None:
    plan = merge_plan(*copy_inputs(tmp_path))
    ballast = small_disk / "ballast"

    class Filling(Quiet):
        def start(self, total_bytes: int, shards: int) -> None:
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))

    with pytest.raises(Refused, match="the disk is full") as caught:
        write(plan, small_disk / "out", reporter=Filling())
    assert caught.value.code == "no-space"
    assert not (small_disk / "out").exists()
    ballast.unlink()
    write(plan, small_disk / "out", reporter=Quiet())
    write(plan, tmp_path / "out", reporter=Quiet())
    assert tree(small_disk / "out") == tree(tmp_path / "out")
    assert os.listdir(small_disk) == ["out"]


# The input changes


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copyfile(path, other)
    rewrite(other)
    shutil.copystat(path, other)
    other.rename(path)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [cut, rewrite, replace, remove]


@pytest.mark.parametrize("moment", ["at once", "after the first tensor", "before the check"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "file", ["base/model-00002-of-00002.safetensors", "adapter/adapter_model.safetensors", "base/config.json"]
)
def test_an_input_that_changes_meanwhile_stops_the_run_and_nothing_new_is_on_disk(
    tmp_path: Path, file: str, change: Callable[[Path], None], moment: str
) -> None:
    plan = merge_plan(*copy_inputs(tmp_path))

    class Meddling(Quiet):
        def meddle(self, now: str) -> None:
            if now == moment:
                change(tmp_path / file)
                self.meddle = lambda now: None  # type: ignore[method-assign]

        def start(self, total_bytes: int, shards: int) -> None:
            self.meddle("at once")

        def advance(self, count: int, tensor: str) -> None:
            self.meddle("after the first tensor")

        def shard_done(self, file: str, size: int, resumed: bool) -> None:
            if len(self.written) == len(plan.shards) - 1:
                self.meddle("before the check")
            super().shard_done(file, size, resumed)

    with pytest.raises(Refused) as caught:
        write(plan, tmp_path / "out", reporter=Meddling())
    assert caught.value.code in ("input-changed", "input-cut", "input-missing")
    assert file in str(caught.value.where)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
