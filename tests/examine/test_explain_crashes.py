"""`explain` and a run that crashed: an unknown traceback is reported as that, whatever harmless lines are beside it."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from converter.cli import main
from converter.examine.explanations.log import Seen, read
from oracle.command import run

HARMLESS = "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`.\n"
FRAMES = """\
Traceback (most recent call last):
  File "/home/u/train.py", line 12, in <module>
    trainer.train()
  File "/opt/venv/lib/python3.11/site-packages/trl/trainer/grpo_trainer.py", line 900, in training_step
    rewards = self.reward(prompts)
"""
UNKNOWN = FRAMES + "trl.errors.WidgetError: the widget is upside down\n"


class WidgetError(Exception):
    pass


def found(text: str, *, live: bool = False) -> list[Seen]:
    return [seen for seen, is_new in read([text.encode()], live=live) if is_new]


def named(text: str) -> list[str]:
    return [seen.message.code for seen in found(text)]


def raised(action: Callable[[], object]) -> str:
    """What Python prints of an error."""
    try:
        action()
    except Exception:
        return traceback.format_exc()
    raise AssertionError("nothing was raised")


def widget() -> None:
    raise WidgetError("the widget is upside down")


def chained() -> None:
    try:
        widget()
    except WidgetError as error:
        raise ValueError("unknown zero stage 1") from error


def unchained() -> None:
    try:
        raise ValueError("unknown zero stage 1")
    except ValueError:
        widget()


def grouped() -> None:
    raise ExceptionGroup("two", [WidgetError("one")])


def test_a_traceback_that_python_prints_is_reported_with_its_exception_place_and_line() -> None:
    text = "step 1\n" + raised(widget)
    (seen,) = found(text)
    assert seen.message.code == "traceback-unknown"
    assert seen.message.severity == "error"
    assert seen.example.endswith("WidgetError: the widget is upside down")
    assert text.splitlines()[seen.line - 1] == seen.example
    assert re.search(rf"WidgetError in \S*{Path(__file__).name}:\d+", seen.text)


def test_the_package_and_the_line_that_raised_are_named_not_the_whole_path() -> None:
    (seen,) = found(UNKNOWN)
    assert "trl.errors.WidgetError in trl/trainer/grpo_trainer.py:900" in seen.text
    assert seen.groups["package"] == "trl"


def test_harmless_lines_beside_an_unknown_traceback_do_not_make_a_log_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "train.log"
    log.write_text(HARMLESS + UNKNOWN + HARMLESS)
    assert main(["explain", str(log), "--fail-on", "error"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("ERROR traceback-unknown (line 7)\n  > trl.errors.WidgetError: the widget is upside down")
    assert main(["explain", str(log), "--json"]) == 0
    messages = json.loads(capsys.readouterr().out)["messages"]
    assert [m["name"] for m in messages] == ["traceback-unknown", "gradient-checkpointing"]


@pytest.mark.parametrize("raises", [chained, unchained])
def test_a_chain_in_which_one_error_is_known_is_explained_by_that_one(raises: Callable[[], None]) -> None:
    assert named(raised(raises)) == ["zero-stage-unknown"]


def test_an_exception_group_is_reported_once_for_each_error_in_it() -> None:
    assert "traceback-unknown" in named(raised(grouped))


def test_a_known_text_that_a_line_of_source_quotes_was_not_printed_by_the_program() -> None:
    quoted = FRAMES + '    raise ValueError("unknown zero stage 1")\nWidgetError: upside down\n'
    assert named(quoted) == ["traceback-unknown"]


def test_an_error_that_is_known_is_not_unknown_too() -> None:
    assert named(FRAMES + "ValueError: unknown zero stage 1\n") == ["zero-stage-unknown"]
    torchs = 'RuntimeError: Error(s) in loading state_dict for X:\n\tMissing key(s) in state_dict: "a.b". \n'
    assert "traceback-unknown" not in named(FRAMES + torchs)


def test_the_second_line_of_an_errors_own_text_may_be_what_is_known() -> None:
    assert named(FRAMES + "RuntimeError: it failed:\n  unknown zero stage 1\n") == ["zero-stage-unknown"]
    apart = FRAMES + "RuntimeError: it failed\n\nValueError: unknown zero stage 1\n"
    assert named(apart) == ["zero-stage-unknown", "traceback-unknown"]


PREFIXES = [
    "[rank0]: ",
    "(WorkerDict pid=123, ip=10.0.0.1) ",
    "\x1b[36m(TaskRunner pid=7)\x1b[0m ",
    "(EngineCore_0 pid=41) ERROR 11-30 10:00:00 [core.py:700] ",
    "2026-11-30T10:00:00.123456Z stderr F ",
    "3: ",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_traceback_behind_a_prefix_is_followed_between_the_lines_of_others(prefix: str) -> None:
    other = "{'loss': 0.693}\nepoch: 1\n"
    lines = "".join(f"{other}{prefix}{line}\n" for line in UNKNOWN.splitlines())
    (seen,) = found(lines)
    assert seen.example == "trl.errors.WidgetError: the widget is upside down"


def test_clocks_may_run_on_between_two_lines_of_a_traceback() -> None:
    lines = [f"11-30 10:00:{9 + n}.{n} node1 {line}" for n, line in enumerate(UNKNOWN.splitlines())]
    assert named("\n".join(lines)) == ["traceback-unknown"]


def test_ranks_whose_lines_are_mixed_are_told_apart() -> None:
    known = FRAMES + "ValueError: unknown zero stage 1\n"
    pairs = zip(UNKNOWN.splitlines(), known.splitlines(), strict=True)
    mixed = "".join(f"[rank0]: {a}\n[rank1]: {b}\n" for a, b in pairs)
    assert sorted(named(mixed)) == ["traceback-unknown", "zero-stage-unknown"]


def test_rays_error_is_named_by_the_error_inside_of_it() -> None:
    text = FRAMES + "ray.exceptions.RayTaskError(KeyError): ray::Worker.run() (pid=1)\n"
    text += '  File "/opt/venv/lib/python3.11/site-packages/verl/workers/fsdp_workers.py", line 7, in init\n    a[b]\n'
    (seen,) = found(text + "KeyError: 'widget'\n")
    assert seen.example == "KeyError: 'widget'"
    assert "verl/workers/fsdp_workers.py:7" in seen.text


def test_the_same_error_of_eight_ranks_is_reported_once_and_counted() -> None:
    (seen,) = found(UNKNOWN * 8)
    assert seen.count == 8


def test_a_log_that_ends_inside_a_traceback_says_so() -> None:
    (seen,) = found(FRAMES)
    assert seen.message.code == "traceback-unknown"
    assert "its last line, which names the error, is not in this text" in seen.text


def test_what_python_says_that_it_ignored_ended_no_run() -> None:
    text = f"Exception ignored in: <function LLM.__del__ at 0x7f>\n{UNKNOWN}done\n"
    assert named(text) == ["exception-ignored"]
    assert named(f"Exception ignored in: <function LLM.__del__ at 0x7f>\nstep 2\n{UNKNOWN}") == [
        "exception-ignored",
        "traceback-unknown",
    ]


def test_a_log_that_is_still_written_is_answered_with_the_errors_own_line() -> None:
    def lines() -> list[bytes]:
        return [line.encode() + b"\n" for line in UNKNOWN.splitlines()]

    blocks = iter([*lines(), b"waiting\n"])
    seen = next(s for s, _ in read(blocks, live=True))
    assert seen.message.code == "traceback-unknown"
    assert list(blocks) == [b"waiting\n"]


@pytest.mark.parametrize(
    ("function", "advice"),
    [
        ("save_pretrained", "what it wrote may be unfinished: rlhf-convert doctor DIR"),
        ("load_adapter", "rlhf-convert doctor ADAPTER --base BASE"),
        ("load_checkpoint", "rlhf-convert doctor CHECKPOINT"),
        ("from_pretrained", "rlhf-convert doctor DIR; where that finds nothing the files are sound"),
        ("sample", "no command here helps: look for the error in trl's issues"),
    ],
)
def test_the_advice_follows_from_what_the_program_was_doing(function: str, advice: str) -> None:
    (seen,) = found(UNKNOWN.replace("training_step", function))
    assert advice in str(seen.message.next)


def test_an_engine_that_was_loading_weights_is_answered_with_the_engines_own_check() -> None:
    (seen,) = found(UNKNOWN.replace("training_step", "load_weights").replace("trl/", "vllm/"))
    assert "rlhf-convert doctor DIR --for vllm" in str(seen.message.next)


def failure(rank: int, code: int) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file="<N/A>")


@pytest.mark.parametrize(("code", "means"), [(1, "Python's"), (-9, "killed from outside"), (-11, "below Python")])
def test_torchruns_table_of_failures_names_the_rank_that_ended_first(code: int, means: str) -> None:
    first, second = failure(3, code), failure(0, 1)
    first.timestamp, second.timestamp = 1, 2

    def fail() -> None:
        raise ChildFailedError("train.py", {3: first, 0: second})

    text = raised(fail)
    assert "Root Cause (first observed failure)" in text
    seen = next(s for s in found(text) if s.message.code == "worker-failed")
    assert "rank 3" in seen.text
    assert f"exit code {code} = " in seen.text
    assert means in seen.text


CRASHES = {
    "[rank0]:[E1130 10:00:00.1 ProcessGroupNCCL.cpp:632] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600069 milliseconds "
    "before timing out.": "collective-timeout",
    "Segmentation fault (core dumped)": "crash-below-python",
    "Fatal Python error: Segmentation fault": "crash-below-python",
    "Bus error (core dumped)": "crash-below-python",
    "[ERROR] failed (exitcode: 1) local_rank: 0 (pid: 139) of binary: /usr/bin/python": "worker-ended",
    "[ERROR] [launch.py:325:sigkill_handler] ['python', 'train.py'] exits with return code = 1": "worker-ended",
    "[ERROR] failed (exitcode: -9) local_rank: 0 (pid: 139) of binary: /usr/bin/python": "out-of-memory",
    "[ERROR] [launch.py:325:sigkill_handler] ['python', 'train.py'] exits with return code = -9": "out-of-memory",
    "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.": (
        "out-of-memory"
    ),
    "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-30T10:00:00 DUE TO TIME LIMIT ***": "run-interrupted",
    "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15": "run-interrupted",
    "KeyboardInterrupt": "run-interrupted",
    "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.": "actor-died",
}


@pytest.mark.parametrize("line", CRASHES)
def test_crashes_without_a_traceback_fail_a_log(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert named(line) == [CRASHES[line]]
    log = tmp_path / "train.log"
    log.write_text(HARMLESS + line + "\n")
    assert main(["explain", str(log), "--fail-on", "error"]) == 1
    assert capsys.readouterr().out.startswith(f"ERROR {CRASHES[line]}")


def test_a_worker_that_ended_does_not_explain_another_ranks_traceback() -> None:
    line = "[ERROR] failed (exitcode: 1) local_rank: 0 (pid: 139) of binary: /usr/bin/python\n"
    assert sorted(named(UNKNOWN + line)) == ["traceback-unknown", "worker-ended"]


def test_a_pasted_error_that_is_not_known_is_reported_as_that() -> None:
    for text in ("WidgetError: the widget is upside down", UNKNOWN):
        assert run("explain", text).out.startswith("ERROR traceback-unknown\n")
        assert run("explain", text, "--fail-on", "error").code == 1
    assert "is not a message that is known here" in run("explain", "a sentence that nobody prints").out


def test_a_table_that_looks_like_an_error_is_none() -> None:
    assert named("| Error | count |\n| ValueError | 3 |\nErrorRate: 0.1\n") == []
