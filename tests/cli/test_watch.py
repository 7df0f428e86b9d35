"""`watch` beside a process that saves for real, slowly: each checkpoint judged once, none half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converter.cli import main
from places import REPOSITORY
from watching import judged_over_a_kill, watcher

BASE = REPOSITORY / "fixtures" / "tiny-qwen2-base"
BROKEN = REPOSITORY / "fixtures" / "tiny-reward-run" / "checkpoint-4"

WRITER = """
import os, shutil, sys, time
source, run, numbers = sys.argv[1], sys.argv[2], sys.argv[3:]
for number in numbers:
    folder = os.path.join(run, f"checkpoint-{number}")
    os.makedirs(folder)
    for name in sorted(os.listdir(source)):
        with open(os.path.join(source, name), "rb") as given, open(os.path.join(folder, name), "wb") as new:
            data = given.read()
            for at in range(4):  # in four pieces
                new.write(data[at * len(data) // 4 : (at + 1) * len(data) // 4])
                new.flush()
                time.sleep(0.02)
"""


def watch(run: Path, state: Path, *more: str) -> int:
    timing = ["--once", "--interval", "0.1", "--settle", "0.3", "--state", str(state)]
    return main(["watch", str(run), *timing, *more])


@pytest.mark.parametrize("notify", ["poll", "inotify"])
def test_each_checkpoint_of_a_slow_writer_is_judged_once_and_whole_over_a_kill_and_a_restart(
    notify: str, tmp_path: Path
) -> None:
    run, state = tmp_path / "run", tmp_path / "state.json"
    run.mkdir()
    with subprocess.Popen([sys.executable, "-c", WRITER, str(BASE), str(run), "1", "2", "3"]) as writer:
        told = judged_over_a_kill(run, state, writer, notify)
    assert told == [(f"checkpoint-{n}", "sound") for n in (1, 2, 3)]


def test_a_checkpoint_that_is_being_written_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint-1", "tmp-checkpoint-2", "checkpoint-3", "checkpoint-4"):
        shutil.copytree(BASE, run / name)
    (run / "checkpoint-3" / "model.safetensors.tmp").write_bytes(b"half")
    with (run / "checkpoint-4" / "optimizer.pt").open("wb"):
        assert watch(run, tmp_path / "state") == 0
    assert capsys.readouterr().out == f"{run}/checkpoint-1: sound\n"
    (run / "tmp-checkpoint-2").rename(run / "checkpoint-2")
    (run / "checkpoint-3" / "model.safetensors.tmp").unlink()
    assert watch(run, tmp_path / "state") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told] == [f"{run}/checkpoint-{n}" for n in (2, 3, 4)]


def test_a_trainers_checkpoint_waits_for_the_file_that_is_written_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(BASE, run / "checkpoint-1")
    (run / "checkpoint-1" / "training_args.bin").write_bytes(b"")
    assert watch(run, tmp_path / "state") == 0
    assert capsys.readouterr().out == ""
    (run / "checkpoint-1" / "trainer_state.json").write_text("{}")
    watch(run, tmp_path / "state")
    assert capsys.readouterr().out.startswith(f"{run}/checkpoint-1: ")


def test_a_checkpoint_that_is_saved_anew_under_its_name_is_judged_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(BASE, run / "checkpoint-1")
    assert [watch(run, tmp_path / "state"), watch(run, tmp_path / "state")] == [0, 0]
    assert capsys.readouterr().out.count("sound") == 1
    shard = next((run / "checkpoint-1").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-64])
    assert watch(run, tmp_path / "state") == 1
    assert "checkpoint-1: ERROR file-truncated" in capsys.readouterr().out


def both(run: Path) -> Path:
    shutil.copytree(BROKEN, run / "checkpoint-4")
    shutil.copytree(BASE, run / "checkpoint-5")
    return run


def test_fail_fast_ends_at_the_first_error_and_leaves_the_rest_for_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = both(tmp_path / "run")
    assert watch(run, tmp_path / "state", "--fail-fast", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["failed"]) == ("error", None)
    assert [f["code"] for f in found["findings"]] == ["zero3-empty-tensors", "sole-copy"]


def test_on_error_runs_the_command_without_a_shell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = both(tmp_path / "run; touch shell")
    shown = tmp_path / "shown"
    code = f"import sys; open({str(shown)!r}, 'a').write(sys.argv[1])"
    assert watch(run, tmp_path / "state", "--on-error", f'{sys.executable} -c "{code}" {{}}') == 1
    assert shown.read_text() == f"{run}/checkpoint-4"
    assert watch(run, tmp_path / "other", "--on-error", f'{sys.executable} -c "import sys; sys.exit(7)"') == 1
    assert "ended with 7" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["no-such-program-of-ours {}", "'", ""])
def test_a_command_that_can_not_be_run_is_refused_before_anything_is_watched(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch(tmp_path, tmp_path / "state", "--on-error", command) == 2
    assert "--on-error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code"), [(["--for", "opnrlhf"], "unknown-trainer"), (["--ignore", "nothing"], "unknown-code")]
)
def test_a_wrong_question_is_an_error_and_not_a_verdict(
    more: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(BASE, tmp_path / "run" / "checkpoint-1")
    assert watch(tmp_path / "run", tmp_path / "state", *more) == 2
    assert code in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_what_is_no_checkpoint_is_no_ones_business_and_what_can_not_be_read_is_no_all_clear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("runs", "logs", "step_7"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "events.txt").write_text("x")
    assert watch(tmp_path / "run", tmp_path / "state") == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path}/run/step_7: not examined: ")


@pytest.mark.signals
def test_ctrl_c_ends_it_as_it_ends_the_other_verbs(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "checkpoint-1")
    running = watcher(tmp_path, tmp_path / "state.json")
    assert running.stdout is not None
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert [json.loads(line)["error"]["code"] for line in out.splitlines()] == ["interrupted"]
    assert "Traceback" not in err


def test_the_state_is_kept_outside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    shutil.copytree(BASE, tmp_path / "run" / "checkpoint-1")
    before = sorted(os.listdir(tmp_path / "run"))
    assert main(["watch", str(tmp_path / "run"), "--once", "--interval", "0.1", "--settle", "0.3"]) == 0
    assert sorted(os.listdir(tmp_path / "run")) == before
    remembered: dict[str, Any] = json.loads(next((tmp_path / "home" / "rlhf-convert").iterdir()).read_text())
    assert [list(names) for names in remembered.values()] == [["checkpoint-1"]]
