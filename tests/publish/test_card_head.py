"""What a card says of heads, trainers and checks, how it is loaded, and that no receipt breaks or bends it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from converter.publish.card import BEGIN, END, CardFacts, model_card, own_text
from converter.shipped import shipped
from fake_hub import FakeHub, running
from hub_here import client_of, published, run
from places import SUPPORT

FIXTURES = shipped("fixtures")
REPO = "me/rm"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    with running(FakeHub()) as server, client_of(server, tmp_path / "home"):
        yield server


def converted(to: str, role: str, out: str) -> list[str]:
    base = ["--base", str(FIXTURES / "tiny-qwen2-base")]
    return ["convert", str(FIXTURES / "tiny-reward-adapter"), out, *base, "--to", to, "--role", role]


def card_of(hub: FakeHub) -> str:
    return published(hub, REPO)["README.md"].decode()


def front(card: str) -> dict[str, Any]:
    value = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("to", "role", "tag", "launch"),
    [
        ("openrlhf", "reward", "reward-model", "--reward.model_name_or_path me/rm"),
        ("openrlhf", "critic", "value-model", "--critic.model_name_or_path me/rm"),
        ("verl", "critic", "value-model", "critic.model.path=me/rm"),
    ],
)
def test_a_card_names_the_head_the_trainer_and_what_was_checked_for_it(
    hub: FakeHub, to: str, role: str, tag: str, launch: str
) -> None:
    assert run(*converted(to, role, "out")).returncode == 0
    ran = run("push", "out", REPO)
    assert ran.returncode == 0, ran.stderr
    card = card_of(hub)
    assert tag in front(card)["tags"]
    assert launch in card
    assert "score.weight \\[1, 64\\] BF16 from the adapter" in card
    assert re.search(rf"Checked for {to} [\d.]+ as {role}, against what its loader does", card)


@pytest.mark.parametrize("out", ["out", pytest.param(f"hf://{REPO}", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("to", "role"), [("openrlhf", "critic"), ("trl", "reward")])
def test_the_snippet_of_a_converted_model_loads_its_head(hub: FakeHub, out: str, to: str, role: str) -> None:
    assert run(*converted(to, role, out)).returncode == 0
    if out == "out":
        assert run("push", "out", REPO).returncode == 0
    code = re.search(r"```python\n(.*?)```", card_of(hub), re.DOTALL)
    assert code is not None
    space: dict[str, Any] = {}
    exec(code[1], space)
    head = load_file(FIXTURES / "tiny-reward-adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(space["model"].score.weight.float(), head.float())


@pytest.mark.parametrize("out", ["out", f"hf://{REPO}"])
def test_the_licence_and_the_commit_of_the_base_are_on_the_card(hub: FakeHub, out: str) -> None:
    base = {p.name: p.read_bytes() for p in (FIXTURES / "tiny-qwen2-base").iterdir()}
    commit = hub.add("org/tiny-qwen2-base", base | {"README.md": b"---\nlicense: apache-2.0\n---\n# Base\n"})
    ran = run("merge-lora", FIXTURES / "tiny-reward-adapter", out, "--base", "org/tiny-qwen2-base")
    assert ran.returncode == 0, ran.stderr
    if out == "out":
        assert run("push", "out", REPO).returncode == 0
    card = card_of(hub)
    assert front(card)["license"] == "apache-2.0"
    assert front(card)["base_model"] == "org/tiny-qwen2-base"
    assert front(card)["base_model_relation"] == "finetune"
    assert commit in card
    assert "# Base" not in card


def test_a_class_that_transformers_would_load_without_its_head_gets_no_python_line(hub: FakeHub) -> None:
    assert run(*converted("llamafactory", "reward", "out")).returncode in (0, 3)
    facts = CardFacts(
        REPO, {"recipe": {"steps": [{"remap-head": {"to": "safe-rlhf", "role": "reward"}}]}},
        {"architectures": ["LlamaModelOfTheTrainer"]}, False, 1,
    )  # fmt: skip
    card = model_card(facts)
    assert "```python" not in card
    assert "--reward_model_name_or_path me/rm" in card


def test_a_check_that_fails_is_said_to_fail() -> None:
    facts = CardFacts(REPO, {}, {}, False, 1, checks=("verl 0.9.1 as critic", (("a head", True), ("no pad", False))))
    card = model_card(facts)
    assert "does not load it as it is meant" in card
    assert "- a head\n- fails: no pad" in card


def test_a_model_from_a_folder_of_a_repository_has_the_repository_as_its_base() -> None:
    inputs = {"source": {"kind": "model", "name": "org/model/checkpoint-5", "revision": "a" * 40}}
    assert front(model_card(CardFacts(REPO, {"inputs": inputs}, {}, False, 1)))["base_model"] == "org/model"


EVIL = "x\n---\nlicense: evil\n---\n<script>` " + END + "\n## Mine [a](b)\x1b[2J\u202e"
JUNK: list[Any] = [None, 7, -1.5, True, EVIL, [], [EVIL], {}, {EVIL: EVIL}, [[EVIL] * 3], {"a": {EVIL: [EVIL]}}]
KEYS = ["version", "inputs", "recipe", "counts", "dropped", "repaired", "consents", "notes", "tensors", "verified"]


@pytest.mark.parametrize("key", KEYS)
def test_no_receipt_breaks_a_card_or_writes_into_it(key: str) -> None:
    deeper = [[["info", "head", EVIL]], {"steps": [{"remap-head": {"to": EVIL, "role": "reward"}}]}, {"steps": [EVIL]}]
    for value in [*JUNK, *deeper]:
        card = model_card(CardFacts(REPO, {"version": "0", key: value}, {"architectures": value}, False, 1))
        assert card.count(BEGIN) == card.count(END) == 1
        assert card.count("\n---\n") == 1
        assert "<script>" not in card
        assert "\x1b" not in card
        assert "\u202e" not in card
        assert "\n## Mine" not in card
        assert "license" not in front(card)
        assert own_text(card) == "# rm"


def test_without_a_token_the_demo_says_how_to_see_a_push_all_the_same(hub: FakeHub) -> None:
    ran = run("demo", "--push", REPO, HF_TOKEN="")
    assert ran.returncode == 3
    command = " ".join(ran.stderr.split())
    assert "tests/support/fake_hub.py rlhf-convert demo --push me/rm" in command


@pytest.mark.slow
def test_the_command_that_the_demo_prints_shows_the_whole_road(tmp_path: Path) -> None:
    hub = SUPPORT / "fake_hub.py"
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"PYTHONWARNINGS": "default"}
    words = [sys.executable, str(hub), sys.executable, "-m", "converter", "demo", "--push", REPO]
    ran = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "me/rm on the fake Hub, private:" in ran.stdout
    assert json.loads((tmp_path / "rlhf-convert-demo" / "rm" / "rlhf-convert.json").read_text())["verified"]
