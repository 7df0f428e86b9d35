"""`schema`: every verb's `--json` is described, the description is a JSON schema, and it can tell right from wrong.

What the recorded commands print is compared in `test_nothing_is_lost`, which runs them; here are the other verbs.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from converter.cli import VERBS, main
from converter.cli.tell.schema import PRINTED, RECEIPT, schema_of
from places import REPOSITORY
from schemas import faults_of

FIXTURES = REPOSITORY / "fixtures"
ZERO = REPOSITORY / "tests" / "runs" / "zero" / "runs" / "lora-z3-n2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("printed")
    for name, fixture in {
        "base": "tiny-qwen2-base",
        "adapter": "tiny-reward-adapter",
        "run": "tiny-reward-run",
    }.items():
        shutil.copytree(FIXTURES / fixture, root / name)
    shutil.copytree(ZERO, root / "zero")
    return root


COMMANDS = {
    "check": ["check", "base", "run"],
    "watch": ["watch", "run", "--once", "--settle", "0.1", "--interval", "0.05", "--state", "state.json"],
    "average": ["average", "base", "base", "average"],
    "interpolate": ["interpolate", "base", "base", "between", "--dry-run"],
    "a recipe": ["average", "base", "base", "other", "--print-recipe"],
    "prune-lora": ["prune-lora", "adapter", "pruned", "--rank", "1"],
    "convert-lora": ["convert-lora", "adapter", "for-vllm", "--for", "vllm"],
    "reshard a state": ["reshard", "zero", "resharded", "--world-size", "1"],
    "reshard a state, planned": ["reshard", "zero", "planned", "--world-size", "1", "--dry-run"],
    "one task of two": ["run", "reshard-bf16", "shared", "--input", "source=base", "--task", "1/2"],
    "no such schema": ["schema", "nothing"],
}


@pytest.mark.parametrize("title", COMMANDS)
def test_a_verb_prints_what_its_schema_says(
    title: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    command = COMMANDS[title]
    main([*command, "--json"])
    text = capsys.readouterr().out
    values = [json.loads(line) for line in text.splitlines()] if command[0] == "watch" else [json.loads(text)]
    assert values
    name = command[0] if command[0] in PRINTED else "doctor"  # an error is the same everywhere
    assert [fault for value in values for fault in faults_of(name, value)] == []


def test_every_verb_has_a_schema() -> None:
    assert {*PRINTED} == {*VERBS} - {"schema", "completion"}


@pytest.mark.parametrize("name", [*PRINTED, RECEIPT])
def test_a_printed_schema_is_valid_and_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", name]) == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    held = {f"#/$defs/{each}" for each in schema["$defs"]}
    assert set(references(schema)) == held
    assert schema["$id"].endswith(f":{name}:1")


def references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [r for each in schema for r in references(each)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return own + [r for each in schema.values() for r in references(each)]


def test_a_receipt_on_disk_is_what_its_schema_says(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main(["merge-lora", "adapter", "rm", "--base", "base", "-q"]) == 0
    receipt = json.loads((place / "rm" / "rlhf-convert.json").read_text())
    assert list(faults_of(RECEIPT, receipt)) == []


SPOILT = {
    "a key is gone": lambda v: v.pop("why"),
    "a severity that nobody knows": lambda v: v["findings"][0].update(severity="bad"),
    "another version": lambda v: v.update(version=2),
    "a key that is not described": lambda v: v["findings"][0].update(colour="red"),
    "a number for a text": lambda v: v.update(path=3),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_wrong_output_is_seen(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", str(FIXTURES / "tiny-reward-run" / "checkpoint-4"), "--json"])
    value = json.loads(capsys.readouterr().out)
    assert list(faults_of("doctor", value)) == []
    spoilt = copy.deepcopy(value)
    SPOILT[how](spoilt)
    assert list(faults_of("doctor", spoilt)) != []


def test_a_published_schema_takes_keys_of_later_releases() -> None:
    value = {"version": 1, "codes": ["a"], "later": True}
    assert list(Draft202012Validator(schema_of("explain")).iter_errors(value)) == []


def test_the_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out.split() == [*PRINTED, RECEIPT]
