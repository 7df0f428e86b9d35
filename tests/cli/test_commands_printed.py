"""Commands that screens print are typed into bash as they stand, in a folder whose name means much to a shell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from converter.blanks import new_name, without_blanks
from converter.diagnostic import Again, Command, Next, Steps, as_argument, commands, completed, is_command, quoted
from doctored import RUN, causal, edit, reward, store
from served_shell import Shell

__all__ = ["causal", "reward"]

ODD = """it's a "run" $HOME"""


def words_in_bash(text: str) -> list[bytes]:
    """The words that bash makes of a command line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True)
    return done.stdout.split(b"\0")[:-1]


def printed_next(screen: str) -> list[str]:
    """The commands below `Next:`."""
    block = re.search(r"^Next: +(.*(?:\n {9}.*)*)", screen, re.MULTILINE)
    assert block is not None, screen
    return [line.strip() for line in block[1].split("\n")]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


WORDS = [
    ODD, f"{ODD}/", "a b", "", "*", "~/x", "a\nb", "\x1b[31mred", "$(id)", "`id`", "back\\slash", "été", "\u202eabc",
    "hf://owner/name@main", "-rm", "--base", "a'b\x07", "!history", "a;b&c|d", "\udcff",
]  # fmt: skip


def test_a_word_that_no_path_can_be_is_quoted_all_the_same() -> None:
    assert quoted("a\ud800b") == r"$'a\355\240\200b'", "a config may spell half of a pair as an escape"


@pytest.mark.parametrize("word", WORDS)
def test_bash_reads_a_quoted_word_as_it_was(word: str) -> None:
    assert words_in_bash(quoted(word)) == [word.encode("utf-8", "surrogateescape")]
    assert quoted(word).isprintable(), "a terminal acts on what is not"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])), max_size=4))
def test_bash_reads_any_command_as_its_words(words: list[str]) -> None:
    command = Command("gather", tuple(words))
    assert words_in_bash(str(command)) == [w.encode() for w in command.words]


def test_an_option_is_given_once_and_the_last_value_counts() -> None:
    command = Command("merge-lora", ("a", "out", "--base", "base", "--dtype=bf16", "--", "-x"))
    changed = command.with_options("--base", "DIR", "--dtype", "float32", "--allow", "no-op")
    assert changed.arguments == ("a", "out", "--base", "DIR", "--dtype", "float32", "--allow", "no-op", "--", "-x")
    assert changed.without("--dtype").arguments == ("a", "out", "--base", "DIR", "--allow", "no-op", "--", "-x")


def test_the_same_command_is_the_users_own_where_its_verb_takes_the_options() -> None:
    typed = Command("convert", ("my run", "out", "--to", "trl", "--tag", "old"))
    step = Steps("try ", Again(("--tag", "new"), otherwise=Command("gather", ("my run", "OUT", "--tag", "new"))))
    assert str(completed(step, typed)) == "try rlhf-convert convert 'my run' out --to trl --tag new"
    assert str(completed(step, typed, lambda name: False)) == "try rlhf-convert gather 'my run' OUT --tag new"
    assert str(step) == "try rlhf-convert gather 'my run' OUT --tag new"
    assert str(Again(("--memory", "2GB"))) == "the same command with --memory 2GB"
    assert str(Again()) == "run the same command again"


BASE_ASKED = "with --base and the folder or the Hub name of the base model"


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (Command("gather", ("run", "OUT")), "rlhf-convert gather run ./run-gathered"),
        (Command("merge-lora", ("run", "OUT", "-j", "1")), "rlhf-convert merge-lora run ./run-merged -j 1"),
        (Command("reshard", ("me/model@v2", "OUT")), "rlhf-convert reshard me/model@v2 ./model-resharded"),
        (Command("gather", ("run", "out", "--base", "BASE")), f"gather run out {BASE_ASKED}"),
        (Command("convert", ("mine", "out", "--base", "BASE")), f"the same command {BASE_ASKED}"),
        (Command("doctor", ("BASE", "--deep")), "doctor --deep with the folder of the base model"),
        (Command("repair", ("run", "OUT", "--lora-alpha", "N")),
         "repair run ./run-fixed with --lora-alpha and the lora_alpha of the training script"),
        (Steps(Command("merge-lora", ("a", "OUT")), ", then ", Command("diff", ("OUT", "b"))),
         "rlhf-convert merge-lora a ./a-merged, then rlhf-convert diff ./a-merged b"),
    ],
)  # fmt: skip
def test_no_command_is_printed_with_a_blank(command: Next, printed: str, here: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(here)
    assert str(without_blanks(command, Command("convert", ("mine", "out", "--to", "trl")))) == printed


def test_a_new_folder_gets_a_name_that_nothing_has(here: Path) -> None:
    for name in ("rm", "rm-fixed"):
        (here / name).mkdir()
    (here / "lone.safetensors").touch()
    made = [new_name(str(here / n), "fixed") for n in ("rm", "rm/", "rm/.", "lone.safetensors")]
    assert made == [*[f"{here}/rm-fixed-2"] * 3, f"{here.parent}/lone-fixed"]


def test_a_new_folder_lies_in_no_folder_that_is_read(here: Path) -> None:
    """Below a folder with a config an output would be refused: the config there is an input."""
    (here / "run" / "checkpoint-1" / "global_step1").mkdir(parents=True)
    assert new_name(f"{here}/run/checkpoint-1/global_step1", "gathered").endswith("/checkpoint-1/global_step1-gathered")
    (here / "run" / "checkpoint-1" / "config.json").write_text("{}")
    assert new_name(f"{here}/run/checkpoint-1/global_step1", "gathered") == f"{here}/run/checkpoint-1-gathered"


def test_a_folder_that_is_named_like_a_blank_is_none(here: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(here)
    (here / "BASE").mkdir()
    command = Command("merge-lora", ("adapter", "out", "--base", "BASE"))
    assert without_blanks(command) == command


def test_steps_say_which_of_their_parts_can_be_typed() -> None:
    first, second = Command("", ("a", "a.old"), program="mv"), Command("repair", ("a", "b"))
    assert str(Steps(first, second)) == "mv a a.old && rlhf-convert repair a b"
    assert is_command(Steps(first, second)) and not is_command(Steps(second, " helps"))
    assert commands(Steps("first ", first, ", then ", second)) == (first, second)
    assert as_argument("-rm") == "./-rm" and as_argument("rm") == "rm"


def test_doctors_command_repairs_and_what_that_prints_loads_the_model(shell: Shell, here: Path, reward: Path) -> None:
    folder = here / "my rm"
    shutil.copytree(reward, folder)
    edit(folder, num_labels=3, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    told = shell.type("rlhf-convert doctor 'my rm'", here)
    assert told.code == 1, told.err
    assert shell.type(f"rlhf-convert doctor {quoted(str(folder))} -q", here).code == 1
    (command,) = printed_next(shell.type(f"rlhf-convert doctor {quoted(str(folder))}", here).out)
    assert command.startswith(f"rlhf-convert repair {quoted(str(folder))} ")
    done = shell.type(command, here)
    assert done.code == 0, done.err
    for each in printed_next(done.out):
        if each.startswith("rlhf-convert"):
            assert shell.type(each, here).code == 0, each
        else:
            words = words_in_bash(each)
            assert words[:2] == [b"python", b"-c"]
            compile(words[2], "next", "exec")
            assert f"{folder}-fixed" in eval(words[2].decode().partition("from_pretrained(")[2].removesuffix("))"))


def test_a_refusal_prints_the_users_own_command_with_what_it_lacked(shell: Shell, here: Path) -> None:
    run = here / "run 1"
    shutil.copytree(RUN / "embed-lora", run)
    state = next(p for p in run.rglob("global_step*"))
    typed = f"rlhf-convert gather {quoted(str(state))} ./out --emit merged --memory 2GB"
    refused = shell.type(typed, here)
    assert refused.code in (2, 3), refused.out
    asked, alone = printed_next(refused.err)
    what = "the model that training began with; for a module of your own, its state dict:"
    assert asked == f"# the same command {BASE_ASKED}, {what}"
    assert shell.type(alone, here).code == 0, alone
    shutil.rmtree(here / "out")
    base = next(p for p in run.rglob("base") if p.is_dir())
    done = shell.type(f"{typed} --base {quoted(str(base))}", here)
    assert done.code == 0, done.err
    assert load_file(here / "out" / "model.safetensors")


def test_a_head_with_a_bias_is_converted_by_the_command_that_the_refusal_prints(
    shell: Shell, here: Path, reward: Path
) -> None:
    source = here / "with bias"
    shutil.copytree(reward, source)
    store(source, lambda t: {n.replace("score.", "value_head."): v for n, v in t.items()})
    store(source, lambda t: t | {"value_head.bias": torch.full((1,), 0.5)})
    typed = f"rlhf-convert convert {quoted(str(source))} out --to trl --role reward"
    refused = shell.type(typed, here)
    assert refused.code in (2, 3), refused.out
    steps = printed_next(refused.err)
    assert steps[0].startswith(typed)
    as_json = json.loads(shell.type(f"{typed} --json", here).out)
    assert as_json["error"]["next"].startswith(f"{typed} --json --")
    done = shell.type(steps[0], here)
    assert done.code == 0, (steps, done.err)


@pytest.mark.parametrize(
    "typed", ["doctor . --for openrlhf@99", "verify . --for openrlhf@99", "rm-to-critic . out --to openrlhf@99"]
)
def test_an_unknown_version_is_answered_with_the_option_of_that_verb(
    shell: Shell, here: Path, causal: Path, typed: str
) -> None:
    shutil.copytree(causal, here, dirs_exist_ok=True)
    refused = shell.type(f"rlhf-convert {typed}", here)
    assert refused.code == 2
    (command,) = printed_next(refused.err)
    verb, option = typed.split(maxsplit=1)[0], typed.split()[-2]
    assert command.startswith(f"rlhf-convert {verb} . ") and command.endswith(f" {option} openrlhf@0.11.2")


def test_a_folder_that_begins_with_a_dash_is_named_so_that_it_is_no_option(
    shell: Shell, here: Path, causal: Path
) -> None:
    shutil.copytree(causal, here / "-lm")
    told = shell.type("rlhf-convert inspect ./-lm", here)
    assert told.code == 0, told.err
    first = printed_next(told.out)[0]
    assert first == "rlhf-convert reshard ./-lm ./-lm-resharded --max-shard-size 5GB"
    done = shell.type(first, here)
    assert done.code == 0, done.err
    assert printed_next(done.out)[0] == "rlhf-convert inspect ./-lm-resharded"
    assert shell.type(printed_next(done.out)[0], here).code == 0
