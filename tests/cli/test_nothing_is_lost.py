"""What a user could do with release 0.1.0 can be done: verbs, flags, exit codes, keys of JSON, steps of recipes.

`surface.json` is what `tools/record_surface.py` printed under that release. More may come; what is there stays.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import record_surface
from converter.recipe.recipe import parse_recipe
from fake_hub import FakeHub, running
from hub_here import client_of
from schemas import faults_of

BEFORE: dict[str, Any] = json.loads(Path(__file__).with_name("surface.json").read_text())


def lost_parameters(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Flags and arguments that are gone, or take something else."""
    for name, was in before.items():
        if name not in now:
            yield f"{name} is gone"
            continue
        found = now[name]
        yield from (f"{name} is not spelt {s} any more" for s in was["spelt"] if s not in found["spelt"])
        yield from (f"{name} does not take {c} any more" for c in was["choices"] if c not in found["choices"])
        for fact in ("takes", "metavar", "default", "repeatable", "required", "least"):
            if was[fact] != found[fact]:
                yield f"{name}: {fact} was {was[fact]!r}, is {found[fact]!r}"
    for name in set(now) - set(before):
        if now[name]["required"]:
            yield f"{name} must be given, and did not exist"


def lost_steps(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Steps and keys that recipes name and that are gone; keys that must be given now."""
    for step, fields in before.items():
        if step not in now:
            yield f"the step {step} is gone"
            continue
        yield from (f"the key {step}.{field} is gone" for field in fields if field not in now[step])
        for field, needed in now[step].items():
            if needed and not fields.get(field, False):
                yield f"the key {step}.{field} must be given now"


def lost_exits(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Commands that return something else, or print a recipe of other steps."""
    for title, was in before.items():
        if was != now[title]:
            yield f"{title}: {' '.join(was['command'])}: was {was}, is {now[title]}"


def types_of(outputs: dict[str, Any], verb_of: dict[str, str]) -> dict[tuple[str, str], set[str]]:
    """What lies at each path of keys in all outputs of a verb together."""
    found: dict[tuple[str, str], set[str]] = {}
    for title, output in outputs.items():
        for path, types in output["keys"].items():
            found.setdefault((verb_of[title], path), set()).update(types.split("/"))
    return found


def lost_keys(before: dict[str, Any], now: dict[str, Any], commands: dict[str, Any]) -> Iterator[str]:
    """Keys of JSON that are gone, hold another type than ever before, or have lost a word that programs compare."""
    verb_of = {title: commands[title]["command"][0] for title in before}
    allowed = types_of(before, verb_of)
    for title, was in before.items():
        found = now[title]
        for path in was["keys"]:
            if path not in found["keys"]:
                yield f"{title}: {path} is gone"
                continue
            types = allowed[verb_of[title], path]
            if types != {"null"} and not set(found["keys"][path].split("/")) <= types:
                yield f"{title}: {path} was {'/'.join(sorted(types))}, is {found['keys'][path]}"
        for path, words in was["words"].items():
            gone = set(words) - set(found["words"].get(path, ()))
            yield from (f"{title}: {path} is never {word} any more" for word in sorted(gone))


@contextlib.contextmanager
def a_hub() -> Iterator[None]:
    """A Hub with one model, for the client of this process."""
    with running(FakeHub()) as hub, client_of(hub, Path.cwd()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's, about itself
        hub.add("me/some", {"config.json": b"{}"})
        yield


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every command does now."""
    texts: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("surface"))
        return {**record_surface.record_commands(texts, a_hub), "texts": texts}


def test_no_verb_is_lost() -> None:
    assert sorted(set(BEFORE["verbs"]) - set(record_surface.verbs())) == []


@pytest.mark.parametrize("verb", BEFORE["verbs"])
def test_no_flag_of_a_verb_is_lost(verb: str) -> None:
    now = json.loads(json.dumps(record_surface.parameters_of(verb)))
    assert list(lost_parameters(BEFORE["verbs"][verb], now)) == []


def read_now(steps: list[str]) -> dict[str, str]:
    """Names of steps, and what a recipe file that says them is read as."""
    lines = [f"  - {name}: {{}}" for name in steps]
    text = "\n".join(["version: 1", "inputs:", "  source: ./model", "steps:", *lines])
    return dict(zip(steps, (s.name for s in parse_recipe(text.encode(), file="old.yaml").steps), strict=True))


def test_no_step_of_a_recipe_is_lost() -> None:
    """Steps may be renamed, and recipe files of before are read all the same."""
    now = record_surface.steps()
    called = read_now(list(BEFORE["steps"]))
    assert list(lost_steps(BEFORE["steps"], now | {old: now[new] for old, new in called.items() if new in now})) == []


def test_steps_that_are_called_otherwise_now_are_those_that_fix() -> None:
    called = read_now(list(BEFORE["steps"]))
    assert {old: new for old, new in called.items() if old != new} == {
        old: old.replace("mend-", "fix-") for old in BEFORE["steps"] if old.startswith("mend-")
    }


def test_no_plug_in_is_lost() -> None:
    now = record_surface.plug_ins()
    called = read_now(BEFORE["plug_ins"]["converter"])
    now["converter"] += [old for old, new in called.items() if new in now["converter"]]
    assert [f"{kind} {n}" for kind, names in BEFORE["plug_ins"].items() for n in names if n not in now[kind]] == []


def test_commands_exit_as_before_and_print_every_key_of_before(commands: dict[str, Any]) -> None:
    lost = [
        *lost_exits(BEFORE["commands"], commands["commands"]),
        *lost_keys(BEFORE["json"], commands["json"], BEFORE["commands"]),
    ]
    assert not lost, "\n".join(lost)


def test_what_every_command_prints_is_what_its_schema_says(commands: dict[str, Any]) -> None:
    wrong = [
        fault
        for title, text in commands["texts"].items()
        for value in record_surface.values_of(text)
        for fault in faults_of(commands["commands"][title]["command"][0], value)
    ]
    assert wrong == []


def test_the_commands_show_every_exit_code_and_every_verb() -> None:
    listed = [c for c in BEFORE["commands"].values() if c["command"][:1] and c["command"][0] in BEFORE["verbs"]]
    assert {c["exit"] for c in listed} == {0, 1, 2, 3, 4}
    assert {c["command"][0] for c in listed} == set(BEFORE["verbs"])
    failing: dict[int, set[str]] = {}
    for each in listed:
        failing.setdefault(each["exit"], set()).add(each["command"][0])
    assert len(failing[2]) >= 8
    assert len(failing[3]) >= 7


LOSSES = {
    "a flag": ("verbs", "merge-lora", "--base"),
    "a verb's argument": ("verbs", "merge-lora", "OUT"),
    "a step": ("steps", "gather"),
    "a key of a step": ("steps", "merge-lora", "numerics"),
    "a key of JSON": ("json", "merge-lora", "keys", "receipt.counts.copied"),
    "a code of an error": ("json", "repair what is lost", "words", "error.code"),
}


@pytest.mark.parametrize("place", LOSSES.values(), ids=LOSSES)
def test_a_loss_is_seen(place: tuple[str, ...]) -> None:
    now = copy.deepcopy(BEFORE)
    inner = now
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    assert len(losses(now)) == 1


CHANGES = {
    "the default of a flag": (("verbs", "gather", "--master", "default"), True),
    "the choices of a flag": (("verbs", "convert", "--role", "choices"), ["reward", "critic"]),
    "a short spelling": (("verbs", "diff", "--verbose", "spelt"), ["--verbose"]),
    "what a flag takes": (("verbs", "gather", "--lora-alpha", "takes"), "int"),
    "a flag that must be given": (("verbs", "gather", "--tag", "required"), True),
    "an exit code": (("commands", "merge-lora over what is there", "exit"), 2),
    "the steps of a printed recipe": (("commands", "a recipe printed by repair", "steps"), ["gather"]),
    "the type of a value": (("json", "push", "keys", "url"), "list"),
    "null where no other output has it": (("json", "merge-lora", "keys", "out"), "null"),
    "a word": (("json", "verify a tampered folder", "words", "checks[].outcome"), ["holds"]),
}


@pytest.mark.parametrize(("place", "value"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(place: tuple[str, ...], value: Any) -> None:
    now = copy.deepcopy(BEFORE)
    inner = now
    for key in place[:-1]:
        inner = inner[key]
    assert inner[place[-1]] != value
    inner[place[-1]] = value
    assert len(losses(now)) == 1


def losses(now: dict[str, Any]) -> list[str]:
    return [
        *(loss for verb, was in BEFORE["verbs"].items() for loss in lost_parameters(was, now["verbs"][verb])),
        *lost_steps(BEFORE["steps"], now["steps"]),
        *lost_exits(BEFORE["commands"], now["commands"]),
        *lost_keys(BEFORE["json"], now["json"], BEFORE["commands"]),
    ]


def test_what_is_added_is_not_a_loss() -> None:
    now = copy.deepcopy(BEFORE)
    now["verbs"]["gather"]["--new"] = copy.deepcopy(now["verbs"]["gather"]["--tag"])
    now["verbs"]["convert"]["--role"]["choices"].append("judge")
    now["steps"]["new"] = {"weights": True}
    now["json"]["push"]["keys"]["new"] = "text"
    assert losses(now) == []
