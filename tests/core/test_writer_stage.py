"""The stage beside the output: what is resumed, what is written anew, and what of strangers is left alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.core.writer.plan import Plan
from converter.errors import Refused
from durability import Quiet, tree
from small_models import finish, half_cast, load, open_model, plan_of, written

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Three files, in each a tensor that is copied and one that is cast."""
    return half_cast(tmp_path)


class Stop(Quiet):
    """Interrupts the run once `after` shards are done."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        super().shard_done(file, size, resumed)
        if len(self.written) + len(self.resumed) == self.after:
            raise KeyboardInterrupt


def stop(plan: Plan, out: Path, *, after: int = 2, **options: Any) -> Path:
    """A run that was interrupted; returns its stage."""
    with pytest.raises(KeyboardInterrupt):
        written(plan, out, reporter=Stop(after), **options)
    assert not out.exists()
    return out.with_name("out.partial")


# Resuming


def test_finished_files_are_kept_and_the_others_written(plan: Plan, tmp_path: Path) -> None:
    stage = stop(plan, tmp_path / "out")
    kept = {name: (stage / name).stat().st_ino for name in SHARDS[:2]}
    reporter = finish(plan, tmp_path / "out")
    assert (reporter.resumed, reporter.written) == (SHARDS[:2], SHARDS[2:])
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in SHARDS[:2]} == kept


def test_other_jobs_and_memory_are_no_other_plan(plan: Plan, tmp_path: Path) -> None:
    stop(plan, tmp_path / "out")
    assert finish(plan, tmp_path / "out", jobs=4, memory=400_000_000).resumed == SHARDS[:2]


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(stage: Path) -> None:
        (stage / name).write_bytes(change((stage / name).read_bytes()))

    return apply


def flip_computed_byte(stage: Path) -> None:
    raw = bytearray((stage / SHARDS[0]).read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    raw[8 + int.from_bytes(raw[:8], "little") + header["cast.0"]["data_offsets"][0]] ^= 1
    (stage / SHARDS[0]).write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped byte of a computed tensor": flip_computed_byte,
    "another header": damage(SHARDS[0], lambda raw: raw[:20] + b"x" + raw[21:]),
    "cut": damage(SHARDS[0], lambda raw: raw[:-1]),
    "longer": damage(SHARDS[0], lambda raw: raw + b"\0"),
    "gone": lambda stage: (stage / SHARDS[0]).unlink(),
    "a link elsewhere": lambda stage: (
        shutil.move(stage / SHARDS[0], stage.parent / "model" / "x")
        and (stage / SHARDS[0]).symlink_to(stage.parent / "model" / "x")
    ),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_finished_file_that_is_not_what_it_was_is_written_again(
    plan: Plan, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    change(stop(plan, tmp_path / "out"))
    reporter = finish(plan, tmp_path / "out")
    assert (reporter.resumed, sorted(reporter.written)) == (SHARDS[1:2], [SHARDS[0], SHARDS[2]])


@pytest.mark.parametrize("tail", [b"", b"{", b'{"shard": "model-0', b"\0\0\0", b"{}\n", b'"text"\n', b"not json\n{}\n"])
def test_a_torn_or_foreign_end_of_the_journal_is_left_out(plan: Plan, tmp_path: Path, tail: bytes) -> None:
    journal = stop(plan, tmp_path / "out") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + tail)
    assert stop(plan, tmp_path / "out", after=3) is not None
    assert finish(plan, tmp_path / "out").resumed == SHARDS


def test_without_resume_all_is_written_anew(plan: Plan, tmp_path: Path) -> None:
    stop(plan, tmp_path / "out")
    assert finish(plan, tmp_path / "out", resume=False).written == SHARDS


def test_the_stage_of_another_plan_is_refused_and_the_first_difference_named(plan: Plan, tmp_path: Path) -> None:
    stage = stop(plan, tmp_path / "out")
    before = tree(stage)
    other = half_cast(tmp_path, layout="pack")
    with pytest.raises(Refused) as caught:
        written(other, tmp_path / "out")
    assert caught.value.code == "stage-differs"
    assert "shard model.safetensors" in caught.value.what
    assert "--no-resume" in str(caught.value.next)
    assert tree(stage) == before
    written(other, tmp_path / "out", resume=False)
    assert os.listdir(tmp_path / "out").count("model.safetensors") == 1
    assert not list((tmp_path / "out").glob("model-*"))


def test_an_input_that_changed_since_is_named_as_the_difference(plan: Plan, tmp_path: Path) -> None:
    stop(plan, tmp_path / "out")
    os.utime(tmp_path / "model" / SHARDS[1])
    with pytest.raises(Refused, match=f"input .*{SHARDS[1]}") as caught:
        written(half_cast(tmp_path), tmp_path / "out")
    assert caught.value.code == "stage-differs"


# What is in the way


def test_a_strangers_folder_under_the_stages_name_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    for resume in (True, False):
        with pytest.raises(Refused) as caught:
            written(plan, tmp_path / "out", resume=resume)
        assert caught.value.code == "stage-foreign"
    assert tree(tmp_path / "out.partial").keys() == {"thesis.tex"}


def test_a_finished_model_that_was_moved_to_the_stages_name_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    other = plan_of(open_model(tmp_path / "model")).provenance | {"recipe": "another"}
    written(Plan(plan.shards, plan.side_files, plan.inputs, {}, other), tmp_path / "out.partial")
    before = tree(tmp_path / "out.partial")
    with pytest.raises(Refused) as caught:
        written(plan, tmp_path / "out")
    assert caught.value.code == "stage-foreign"
    assert tree(tmp_path / "out.partial") == before


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_link_under_the_stages_name_is_left_alone(plan: Plan, tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "out.partial"
    path.write_text("") if kind == "file" else path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused) as caught:
        written(plan, tmp_path / "out")
    assert caught.value.code == "stage-foreign"
    assert os.listdir(tmp_path / "elsewhere") == []


def busy(plan: Plan, out: Path) -> None:
    with pytest.raises(Refused) as caught:
        written(plan, out)
    assert caught.value.code == "output-busy"


def test_a_second_run_on_the_same_output_is_refused_and_the_first_goes_on(plan: Plan, tmp_path: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    class Slow(Quiet):
        def start(self, total_bytes: int, shards: int) -> None:
            began.set()
            assert go_on.wait(30)

    first = threading.Thread(target=written, args=(plan, tmp_path / "out"), kwargs={"reporter": Slow()})
    first.start()
    assert began.wait(30)
    busy(plan, tmp_path / "out")
    go_on.set()
    first.join()
    assert load(tmp_path / "out").keys() == {f"{kind}.{i}" for kind in ("copied", "cast") for i in range(3)}


def test_a_stage_that_is_published_between_its_opening_and_its_locking_is_not_taken_for_ours(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, published = fcntl.flock, tmp_path / "published"

    def publish_first(fd: int, how: int) -> None:
        if not published.exists():
            (tmp_path / "out.partial").rename(published)
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", publish_first)
    written(plan, tmp_path / "out")
    assert os.listdir(published) == []
    assert sorted(p.name for p in (tmp_path / "out").glob("model-*.safetensors")) == SHARDS


def test_a_file_that_was_not_finished_gives_its_space_back(plan: Plan, tmp_path: Path) -> None:
    class Failing(Quiet):
        def advance(self, count: int, tensor: str) -> None:
            if tensor == "cast.2":
                while len(self.written) < 2:
                    time.sleep(0.001)
                raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(Refused, match="Input/output error"):
        written(plan, tmp_path / "out", reporter=Failing())
    assert tree(tmp_path / "out.partial").keys() == {"journal.jsonl", *SHARDS[:2]}
    assert finish(plan, tmp_path / "out").resumed == SHARDS[:2]
