"""How the command line answers before any checkpoint is opened: help, usage errors, bare paths, its own bugs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from converter.cli import VERBS, with_verb
from imported import modules_after_each, third_party
from oracle.command import run


@pytest.fixture(scope="module")
def typer_alone() -> set[str]:
    """What typer imports for the help of a command with one option; whatever else we import is our doing."""
    code = (
        "import sys, typer\n"
        "app = typer.Typer(rich_markup_mode=None)\n"
        "@app.command()\ndef verb(option: bool = False): pass\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return third_party({m.split(".")[0] for m in done.stdout.rpartition("MODULES ")[2].split()})


HELP = [["--help"], [], ["--version"], *([v, "--help"] for v in VERBS)]


@pytest.fixture(scope="module")
def imported() -> list[set[str]]:
    """What each command line of `HELP` imports."""
    return modules_after_each(HELP)


@pytest.mark.parametrize("number", range(len(HELP)), ids=[" ".join(a) or "nothing" for a in HELP])
def test_help_imports_typer_and_nothing_else(number: int, imported: list[set[str]], typer_alone: set[str]) -> None:
    assert "converter" in imported[number]
    assert third_party(imported[number]) <= typer_alone
    assert not typer_alone & {"torch", "transformers", "peft", "huggingface_hub", "yaml", "rich", "numpy"}


def test_the_verbs_are_those_that_typer_knows() -> None:
    ran = run("--help")
    assert ran.code == 0
    listed = ran.out[ran.out.index("Commands:") :].splitlines()[1:]
    assert tuple(line.split()[0] for line in listed if line.strip()) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_ends_with_three_copyable_examples_of_it(verb: str) -> None:
    ran = run(verb, "--help")
    assert (ran.code, ran.err) == (0, "")
    examples = ran.out[ran.out.index("Examples:") :].strip().splitlines()[1:]
    assert len(examples) == 3
    assert all(f"rlhf-convert {verb}" in line for line in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_kebab_case(verb: str) -> None:
    options = [w.strip(",") for w in run(verb, "--help").out.split() if w.startswith("--")]
    assert [o for o in options if "_" in o or o != o.lower()] == []


def test_a_bare_path_is_inspected_and_a_mistyped_verb_is_not_a_path(tmp_path: Path) -> None:
    assert with_verb([str(tmp_path)]) == ["inspect", str(tmp_path)]
    assert with_verb(["./none", "--json"]) == ["inspect", "./none", "--json"]
    assert with_verb(["Qwen/Qwen2.5-7B"]) == ["inspect", "Qwen/Qwen2.5-7B"]
    assert with_verb(["merge"]) == ["merge"]
    assert with_verb([]) == ["--help"]
    assert with_verb(["demo"]) == ["demo"]


def test_a_mistyped_verb_is_a_usage_error_that_names_the_nearest() -> None:
    ran = run("merge-lroa", "./a", "./b")
    assert (ran.code, ran.out) == (2, "")
    assert "Did you mean 'merge-lora'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge-lora"], "Missing argument 'ADAPTER'"),
        (["merge-lora", "a", "b", "--wieght", "1"], "No such option: --wieght"),
        (["merge-lora", "a", "b", "--jobs", "0"], "'-j' / '--jobs'"),
        (["merge-lora", "a", "b", "--weight", "half"], "'--weight'"),
        (["merge-lora", "a", "b", "--numerics", "exact"], "'--numerics'"),
        (["merge-lora", "a", "b", "--layout", "any"], "'--layout'"),
        (["merge-lora", "a", "b", "--out", "c"], "two outputs: b and --out c"),
        (["merge-lora", "a"], "the output is missing"),
        (["merge-lora", "a", "b", "--adapter", "c", "--weight", "1"], "one --weight for each adapter"),
        (["merge-lora", "a", "b", "--memory", "lots"], "--memory is not a size: lots"),
        (["merge-lora", "a", "b", "--max-shard-size", "0"], "--max-shard-size is not a size: 0"),
        (["merge-lora", "a", "b", "--dtype", "float3"], "float3"),
        (["run", "merge-reward-lora", "out", "--input", "adapter"], "--input takes NAME=PATH, not adapter"),
        (["run", "no-such-recipe", "out"], "neither a file nor a shipped recipe"),
    ],
)
def test_a_usage_error_exits_2_with_one_message_on_stderr(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.text
    assert "Traceback" not in ran.text
    assert list(tmp_path.iterdir()) == []


def test_json_errors_are_one_object_on_stdout() -> None:
    ran = run("merge-lora", "--json")
    assert (ran.code, ran.err) == (2, "")
    error = json.loads(ran.out)["error"]
    assert (error["code"], error["exit_code"], error["next"]) == ("usage", 2, "rlhf-convert merge-lora --help")


def broken(*arguments: object) -> int:
    raise RuntimeError("the sky fell\x1b[2J")


def test_a_bug_of_ours_exits_70_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.cli.tell.environment.env", broken)
    monkeypatch.delenv("RLHF_CONVERT_DEBUG", raising=False)
    ran = run("env")
    assert (ran.code, ran.out) == (70, "")
    assert "a bug in rlhf-convert: RuntimeError: the sky fell\\x1b[2J" in ran.err
    assert "Traceback" not in ran.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.cli.tell.environment.env", broken)
    monkeypatch.setenv("RLHF_CONVERT_DEBUG", "1")
    ran = run("env")
    assert ran.code == 70
    assert "Traceback" in ran.err
    assert "the sky fell" in ran.err


def test_windows_is_refused_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    ran = run("env")
    assert (ran.code, ran.out) == (3, "")
    assert "Windows is not supported" in ran.err


def test_env_prints_versions_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    ran = run("env", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert set(found["packages"]) >= {"torch", "peft", "transformers", "safetensors"}
    assert "canary" not in ran.text
    assert str(Path.home()) not in ran.text


def test_a_reader_that_goes_away_is_no_error_to_talk_about() -> None:
    done = subprocess.run(
        f"{sys.executable} -m converter merge-lora --help | head -1",
        shell=True,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("Usage:")
    assert done.stderr == ""
