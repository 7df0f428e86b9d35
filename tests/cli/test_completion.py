"""`completion`, asked in the shells themselves; and the man page, which is what `--help` says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import write_man
from converter.cli import VERBS, main
from converter.cli.verbs.all import command_of
from converter.dialects.known import trainers

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_rlhf_convert
printf '%s\\n' "${COMPREPLY[@]}"
"""

ZSH = """
compdef() { :; }
compadd() { shift; for word in "$@"; do [[ $word == $PREFIX* ]] && print -r -- $word; done; true }
_describe() { local name=${@[-1]}; for each in "${(@P)name}"; do [[ $each == $PREFIX* ]] && print -r -- ${each%%:*}; done; true }
_files() { local -a found=(${PREFIX}*(N/)); (( $#found )) && print -rl -- $found; true }
_message() { :; }
script=$1; shift
words=("$@"); CURRENT=$#; PREFIX=${@[-1]}
source $script
_rlhf_convert
"""  # noqa: E501

FISH = """
{functions}
source {script}
complete -C '{line}'
"""

QUESTIONS = {
    "a verb": (["mer"], ["merge-lora"]),
    "verbs of one beginning": (["con"], ["convert", "convert-lora"]),
    "a choice": (["doctor", "--fail-on", "c"], ["changes-numbers", "cosmetic"]),
    "a trainer": (["convert", "--to", "openr"], [t for t in trainers() if t.startswith("openr")]),
    "a trainer, by another option": (["doctor", "--for", "ver"], [t for t in trainers() if t.startswith("ver")]),
    "a code": (["doctor", "--ignore", "zero3-em"], ["zero3-empty-tensors"]),
    "a code that is explained": (["explain", "zero3-em"], ["zero3-empty-tensors"]),
    "an option": (["merge-lora", "--numer"], ["--numerics"]),
    "a schema": (["schema", "rece"], ["receipt"]),
    "a folder": (["doctor", "my-"], ["my-model"]),
    "a folder of an option": (["doctor", "adapter", "--base", "my-"], ["my-model"]),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from converter.cli.tell.completion import bash, fish, verbs, zsh

    folder = tmp_path_factory.mktemp("scripts")
    found = list(verbs())
    for name, make in (("bash", bash), ("zsh", zsh), ("fish", fish)):
        (folder / name).write_text(make(found))
    (folder / "my-model").mkdir()
    (folder / "my-file").write_text("")
    return folder


def asked(shell: str, scripts: Path, words: list[str]) -> list[str]:
    line = ["rlhf-convert", *words]
    if shell == "fish":
        functions = [f"set fish_function_path {each}" for each in unpacked("fish", "usr/share/fish/functions")]
        text = FISH.format(script=scripts / "fish", line=" ".join(line), functions="\n".join(functions))
        command = ["fish", "--no-config", "-c", text]
    else:
        modules = [f"module_path=({each})\n" for each in unpacked("zsh", "usr/lib/*/zsh/*")]
        text = BASH if shell == "bash" else "".join(modules) + ZSH
        command = [shell, "-f" if shell == "zsh" else "--norc", "-c", text, shell]
        command += [str(scripts / shell), *line]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return sorted({each.split("\t")[0].rstrip("/") for each in done.stdout.splitlines() if each})


def unpacked(shell: str, pattern: str) -> list[Path]:
    """What a shell that is unpacked and not installed would look for in its place."""
    home = shutil.which(shell)
    return sorted(Path(home).parents[1].glob(f"root/{pattern}")) if home else []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_shell_completes(question: str, shell: str, scripts: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    words, expected = QUESTIONS[question]
    assert asked(shell, scripts, words) == sorted(expected)


def test_every_verb_and_every_option_is_in_every_script(scripts: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        text = (scripts / shell).read_text()
        for verb in VERBS:
            assert re.search(rf"\b{verb}\b", text), (shell, verb)
        for parameter in command_of("gather").params:
            for name in (n for n in parameter.opts if n.startswith("--")):
                assert (f"-l {name[2:]}" if shell == "fish" else name) in text


def test_the_verb_prints_the_script(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == (scripts / "bash").read_text()
    assert main(["completion", "tcsh"]) == 2


# The man page


def test_the_man_page_is_what_the_tool_writes() -> None:
    assert write_man.PAGE.read_text("utf-8") == write_man.page(), "python tools/write_man.py writes it"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not here")
def test_the_man_page_is_set_without_a_warning_and_has_every_option() -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-rLL=200n", "-ww", str(write_man.PAGE)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    for verb in VERBS:
        assert f"rlhf-convert {verb} [options]" in done.stdout
        for parameter in command_of(verb).params:
            assert all(name in done.stdout for name in parameter.opts if name.startswith("--")), (verb, parameter.opts)
