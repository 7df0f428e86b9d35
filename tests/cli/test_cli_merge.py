"""`merge-lora` as a user meets it: screens, flags, exit codes, and what is on disk afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converter.core.writer import shard_writer
from converter.shipped import shipped
from oracle.command import listing, run

FIXTURES = shipped("fixtures")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the shipped base, under the name that the shipped adapter records, and the adapter."""
    shutil.copytree(FIXTURES / "tiny-qwen2-base", tmp_path / "tiny-qwen2-base")
    shutil.copytree(FIXTURES / "tiny-reward-adapter", tmp_path / "trl-rm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def labels(screen: str) -> list[str]:
    """First word of each line that has one in the first column."""
    return [line.split()[0] for line in screen.splitlines() if line and not line.startswith(" ")]


def test_the_screen_of_a_merge_says_what_was_found_planned_written_checked_and_what_to_type_next(here: Path) -> None:
    ran = run("merge-lora", "./trl-rm", "./rm")
    assert ran.code == 0, ran.err
    assert labels(ran.out) == ["adapter", "base", "note", "plan", "needs", "2/2", "checked", "update", "wrote", "Next:"]
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in ran.out.splitlines() if not line.startswith(" ")}
    assert lines["adapter"] == "./trl-rm LoRA r=8 alpha=16 SEQ_CLS; 29 of 29 tensors placed"
    assert lines["base"] == "tiny-qwen2-base (as recorded), bf16"
    assert lines["plan"] == "12 copied, 14 merged, 1 from adapter: score.weight, 1 dropped: lm_head.weight"
    assert lines["checked"] == "27 re-read, 24 recomputed equal, merged values all finite"
    assert lines["wrote"] == "./rm Qwen2ForSequenceClassification, 1 label, pad <|endoftext|>"
    assert lines["Next:"] == "rlhf-convert inspect ./rm"


def test_without_a_terminal_progress_is_one_line_per_shard_on_stderr(here: Path) -> None:
    ran = run("merge-lora", "./trl-rm", "./rm")
    lines = ran.err.splitlines()
    assert [line.split()[0] for line in lines] == ["1/2", "2/2"]
    assert {line.split()[1] for line in lines} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_on_a_terminal_a_bar_is_drawn_on_stderr_and_stdout_stays_plain(here: Path) -> None:
    import pty

    primary, secondary = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "converter", "merge-lora", "./trl-rm", "./rm"],
        stdout=subprocess.PIPE,
        stderr=secondary,
        check=True,
        timeout=120,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(secondary)
    drawn = b""
    while chunk := _read(primary):
        drawn += chunk
    assert "━".encode() in drawn
    assert b"model-00001-of-00002.safetensors" not in drawn
    assert b"\x1b" not in done.stdout


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # the other side is closed
        return b""


def test_the_command_that_loads_the_output_is_copyable_and_works(here: Path) -> None:
    ran = run("merge-lora", "./trl-rm", "./rm")
    command = ran.out.splitlines()[-1].strip()
    assert command.startswith('python -c "from transformers import Qwen2ForSequenceClassification as M;')
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert "(score): Linear(in_features=64, out_features=1, bias=False)" in printed.getvalue()


def test_json_is_one_object_with_the_receipt_that_lies_beside_the_model(here: Path) -> None:
    ran = run("merge-lora", "./trl-rm", "./rm", "--json")
    found = json.loads(ran.out)
    assert found["receipt"] == json.loads((here / "rm" / "rlhf-convert.json").read_text())
    assert found["out"] == "./rm"
    assert found["receipt"]["counts"] == {"copied": 13, "computed": 14, "filled": 0, "dropped": 1}


def test_quiet_says_nothing_and_verbose_adds_a_table_by_projection(here: Path) -> None:
    quiet = run("merge-lora", "./trl-rm", "./rm", "--quiet")
    assert (quiet.code, quiet.text.strip()) == (0, "")
    verbose = run("merge-lora", "./trl-rm", "./rm2", "--verbose")
    assert [line.split()[0] for line in verbose.out.splitlines() if "survives  size" in line].count("q_proj") == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(here: Path) -> None:
    before = listing(here)
    ran = run("merge-lora", "./trl-rm", "./rm", "--dry-run")
    assert ran.code == 0
    assert labels(ran.out) == ["adapter", "base", "note", "plan", "needs", "dry"]
    assert listing(here) == before


@pytest.mark.parametrize(
    "verb", [["merge-lora", "./trl-rm", "./rm", "--dry-run"], ["inspect", "./trl-rm"], ["./trl-rm"]]
)
def test_planning_and_inspecting_import_no_torch(here: Path, verb: list[str]) -> None:
    code = "import sys; from converter.cli import main; print(main(sys.argv[1:]), 'MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *verb], capture_output=True, text=True, check=True, timeout=60)
    head, _, modules = done.stdout.rpartition(" MODULES ")
    assert head.endswith("0")
    assert not {m.split(".")[0] for m in modules.split()} & {"torch", "transformers", "peft", "safetensors", "numpy"}


def test_a_dry_run_refuses_what_the_run_would_refuse(here: Path) -> None:
    (here / "rm").mkdir()
    (here / "rm" / "notes.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert run("merge-lora", "./trl-rm", "./rm", "--dry-run", *more).code == 3
    ran = run("merge-lora", "./trl-rm", "./rm2", "--dry-run", "--memory", "10MB")
    assert ran.code == 3
    assert "--memory" in ran.err


def test_the_printed_recipe_gives_the_same_weights_as_the_verb(here: Path) -> None:
    options = ["--dtype", "fp32", "--max-shard-size", "100KB", "--numerics", "peft"]
    printed = run("merge-lora", "./trl-rm", "--print-recipe", *options)
    assert (printed.code, printed.err) == (0, "")
    (here / "recipe.yaml").write_text(printed.out)
    assert run("merge-lora", "./trl-rm", "./by-verb", *options).code == 0
    assert run("run", "recipe.yaml", "./by-recipe").code == 0
    assert listing(here / "by-verb") == listing(here / "by-recipe")
    assert len(list((here / "by-verb").glob("*.safetensors"))) > 2


def test_out_can_be_an_option(here: Path) -> None:
    assert run("merge-lora", "./trl-rm", "--out", "./rm").code == 0
    assert (here / "rm" / "config.json").is_file()


def test_a_relative_output_and_a_home_folder_mean_what_they_mean_in_a_shell(here: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "home").mkdir()
    assert run("merge-lora", "trl-rm", "~/rm").code == 0
    assert (here / "home" / "rm" / "config.json").is_file()


def test_an_existing_output_is_refused_and_overwrite_replaces_only_ours(here: Path) -> None:
    assert run("merge-lora", "./trl-rm", "./rm").code == 0
    before = listing(here / "rm")
    ran = run("merge-lora", "./trl-rm", "./rm")
    assert (ran.code, ran.out) == (3, "")
    assert "output-exists" in ran.err
    assert run("merge-lora", "./trl-rm", "./rm", "--overwrite", "--dtype", "fp32").code == 0
    assert listing(here / "rm") != before
    assert run("merge-lora", "./trl-rm", "./rm", "--overwrite").code == 0
    assert listing(here / "rm") == before
    assert sorted(p.name for p in here.iterdir()) == ["rm", "tiny-qwen2-base", "trl-rm"]


# The base model


def test_a_base_under_another_name_is_told_as_changing_numbers(here: Path) -> None:
    (here / "tiny-qwen2-base").rename(here / "some-base")
    ran = run("merge-lora", "./trl-rm", "./rm", "--base", "./some-base")
    assert ran.code == 0
    told = (
        "note changes-numbers (base-differs): the adapter was trained on tiny-qwen2-base, the base given is some-base"
    )
    assert told in ran.text
    receipt = json.loads((here / "rm" / "rlhf-convert.json").read_text())
    assert ["changes-numbers", "base-differs"] in [note[:2] for note in receipt["notes"]]


@pytest.mark.parametrize("given", ["./tiny-qwen2-base", "tiny-qwen2-base/"])
def test_the_recorded_base_given_by_name_is_no_difference(here: Path, given: str) -> None:
    ran = run("merge-lora", "./trl-rm", "./rm", "--base", given)
    assert ran.code == 0
    assert "changes-numbers" not in ran.text


def test_another_revision_of_the_recorded_base_is_told_as_changing_numbers(here: Path, monkeypatch) -> None:
    trained_on, cached = "a" * 40, "b" * 40
    repository = here / "cache" / "models--acme--tiny"
    shutil.copytree(here / "tiny-qwen2-base", repository / "snapshots" / cached)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(cached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    edit_adapter(here / "trl-rm", base_model_name_or_path="acme/tiny", revision=trained_on)

    ran = run("merge-lora", "./trl-rm", "./rm", "--base", "acme/tiny")
    assert ran.code == 0, ran.err
    assert f"base acme/tiny@{cached[:7]}, bf16" in ran.text
    assert f"the adapter was trained on revision {trained_on} of its base, the one given is {cached}" in ran.text

    edit_adapter(here / "trl-rm", revision=cached)
    ran = run("merge-lora", "./trl-rm", "./rm2")
    assert f"base acme/tiny@{cached[:7]} (as recorded), bf16" in ran.text
    assert "changes-numbers" not in ran.text
    inputs = json.loads((here / "rm2" / "rlhf-convert.json").read_text())["inputs"]
    assert (inputs["source"]["name"], inputs["source"]["revision"]) == ("acme/tiny", cached)


def test_a_revision_after_an_at_sign_picks_the_snapshot(here: Path, monkeypatch) -> None:
    repository = here / "cache" / "models--acme--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(here / "tiny-qwen2-base", repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    ran = run("merge-lora", "./trl-rm", "./rm", "--base", "acme/tiny@aaaaaaa")
    assert ran.code == 0, ran.err
    assert "base acme/tiny@aaaaaaa, bf16" in ran.text


def edit_adapter(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("recorded", [None, ""])
def test_an_adapter_that_records_no_base_asks_for_one(here: Path, recorded: str | None) -> None:
    edit_adapter(here / "trl-rm", base_model_name_or_path=recorded)
    ran = run("merge-lora", "./trl-rm", "./rm")
    assert (ran.code, ran.out) == (2, "")
    assert "base-unknown" in ran.err
    assert "the same command with --base and the folder or the Hub name of the base model" in ran.text
    assert "rlhf-convert inspect ./trl-rm" in ran.text


def test_a_recorded_base_that_is_not_here_is_no_hub_error(here: Path) -> None:
    shutil.rmtree(here / "tiny-qwen2-base")
    ran = run("merge-lora", "./trl-rm", "./rm")
    assert (ran.code, ran.out) == (3, "")
    assert "the adapter records tiny-qwen2-base as its base" in ran.text
    assert "the same command with --base and the folder or the Hub name of the base model" in ran.text
    assert "rlhf-convert inspect ./trl-rm" in ran.text
    assert "hub-download" not in ran.err


# Arguments the wrong way round


@pytest.mark.parametrize(
    ("arguments", "corrected"),
    [
        (["tiny-qwen2-base", "rm", "--base", "trl-rm"], "rlhf-convert merge-lora trl-rm rm --base tiny-qwen2-base"),
        (["tiny-qwen2-base", "trl-rm"], "rlhf-convert merge-lora trl-rm trl-rm-merged --base tiny-qwen2-base"),
        (["tiny-qwen2-base", "rm"], "merge-lora rm --base tiny-qwen2-base with the folder of the adapter"),
        (["tiny-qwen2-base/config.json", "rm"], "tiny-qwen2-base/config.json is a model, not an adapter"),
        (["trl-rm", "rm", "--base", "trl-rm"], "the same command with --base and the folder"),
    ],
)
def test_swapped_arguments_are_recognised_by_content(here: Path, arguments: list[str], corrected: str) -> None:
    before = listing(here)
    ran = run("merge-lora", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert corrected in ran.err
    assert listing(here) == before


def test_a_run_folder_with_several_checkpoints_lists_them_newest_last(here: Path) -> None:
    for step in (500, 1000, 250):
        shutil.copytree(here / "trl-rm", here / "run" / f"checkpoint-{step}")
    ran = run("merge-lora", "./run", "./rm")
    assert (ran.code, ran.out) == (2, "")
    assert "./run/checkpoint-250, ./run/checkpoint-500, ./run/checkpoint-1000" in ran.err


# Signals


@pytest.mark.signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_writing_exits_with_one_line_and_the_same_command_resumes(
    here: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, once = shard_writer.copy_run, [1]  # a second signal ends the process at once, as it should

    def stop(*given: Any, **named: Any) -> Any:
        if once:
            once.pop()
            os.kill(os.getpid(), number)
        return real(*given, **named)

    command = ["merge-lora", "./trl-rm", "./rm"]
    with monkeypatch.context() as patched:
        patched.setattr(shard_writer, "copy_run", stop)
        ran = run(*command)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert "interrupted, nothing published: what is done is kept in rm.partial" in ran.text
    assert not (here / "rm").exists()
    assert (here / "rm.partial").is_dir()
    assert run(*command).code == 0
    assert not (here / "rm.partial").exists()
    assert run("merge-lora", "./trl-rm", "./again").code == 0
    assert listing(here / "rm") == listing(here / "again")


def test_a_file_that_can_t_grow_fails_in_one_line_and_the_same_command_resumes(here: Path) -> None:
    command = ["merge-lora", "./trl-rm", "./rm"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        ran = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ran.code == 3, ran.err
    assert "Traceback" not in ran.err
    assert "REFUSED system: nothing published" in ran.err
    assert "File too large" in ran.err
    assert "repeat the same command" in ran.err
    assert not (here / "rm").exists()
    assert run(*command).code == 0
    assert sorted(p.name for p in here.iterdir()) == ["rm", "tiny-qwen2-base", "trl-rm"]


@pytest.mark.signals
def test_a_signal_while_planning_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.recipe.run.make_plan", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    ran = run("merge-lora", "./trl-rm", "./rm")
    assert ran.code == 143
    assert "Traceback" not in ran.err
    assert sorted(p.name for p in here.iterdir()) == ["tiny-qwen2-base", "trl-rm"]


def test_a_token_is_printed_nowhere_and_kept_nowhere(here: Path) -> None:
    canary = "hf_canarycanarycanarycanary"
    ran = run("merge-lora", "./trl-rm", "./rm", "--token", canary, "--verbose")
    assert ran.code == 0
    assert canary not in ran.text
    assert all(canary.encode() not in p.read_bytes() for p in (here / "rm").rglob("*") if p.is_file())
    missing = run("merge-lora", "acme/none", "./rm2", "--token", canary)
    assert missing.code == 3
    assert canary not in missing.text


def test_control_characters_in_names_reach_no_terminal(here: Path) -> None:
    edit_adapter(here / "trl-rm", base_model_name_or_path="evil\x1b[2Jbase", task_type="SEQ_CLS")
    for arguments in (["merge-lora", "./trl-rm", "./rm"], ["inspect", "./trl-rm"]):
        ran = run(*arguments)
        assert "\x1b" not in ran.out + ran.err


def test_a_base_given_as_the_output_is_recognised(here: Path) -> None:
    ran = run("merge-lora", "trl-rm", "tiny-qwen2-base")
    assert ran.code == 2
    assert "rlhf-convert merge-lora trl-rm trl-rm-merged --base tiny-qwen2-base" in ran.err


def test_a_relative_base_that_an_adapter_records_is_found_beside_it_from_anywhere(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    ran = run("merge-lora", str(here / "trl-rm"), "out")
    assert ran.code == 0, ran.err
    assert f"{here}/tiny-qwen2-base (as recorded)" in ran.out
