"""`push` through the real client to a Hub on loopback: what goes, what comes of faults, and what the card says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from converter.publish.card import BEGIN, END, CardFacts, model_card
from fake_hub import FakeHub, Fault, running
from hub_here import client_of, commits, on_disk, run
from hub_here import published as published_in

REPO = "me/rm"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with running(FakeHub(multipart=20_000)) as server, client_of(server, tmp_path):
        yield server


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that a conversion wrote, with its receipt."""
    folder = tmp_path_factory.mktemp("push")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder / "source")
    assert run("reshard", folder / "source", folder / "rm", "--max-shard-size", "40KB", "-q").returncode == 0
    return folder / "rm"


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "rm"))


def command(hub: FakeHub, *arguments: str | Path) -> tuple[list[str], dict[str, str]]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub.environment()
    return [sys.executable, "-m", "converter", *map(str, arguments)], env


def push(hub: FakeHub, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return run("push", *arguments, **env)


def published(hub: FakeHub) -> dict[str, bytes]:
    return published_in(hub, REPO)


def expect_whole(hub: FakeHub, model: Path) -> None:
    found = published(hub)
    card = found.pop("README.md")
    assert found == on_disk(model)
    assert BEGIN.encode() in card


def test_a_folder_is_one_private_commit_that_equals_it_and_can_be_loaded(hub: FakeHub, model: Path) -> None:
    ran = push(hub, model, REPO, "--json")
    assert ran.returncode == 0, ran.stderr
    expect_whole(hub, model)
    assert commits(hub, REPO) == 1
    assert hub.repos[REPO].private
    assert re.fullmatch(rf"{hub.url}/me/rm/commit/[0-9a-f]{{40}}", json.loads(ran.stdout)["url"])
    _, loaded = LlamaForSequenceClassification.from_pretrained(REPO, output_loading_info=True)
    assert not loaded["missing_keys"]


def test_pushed_again_nothing_is_sent_and_no_commit_is_made(hub: FakeHub, model: Path) -> None:
    assert push(hub, model, REPO).returncode == 0
    hub.log.clear()
    ran = push(hub, model, REPO)
    assert ran.returncode == 0
    assert "all was there already" in ran.stdout
    assert commits(hub, REPO) == 1
    assert not hub.requests("^PUT|/commit/")


def test_only_what_changed_is_sent(hub: FakeHub, model: Path) -> None:
    assert push(hub, model, REPO).returncode == 0
    (model / "generation_config.json").write_text("{}")
    hub.log.clear()
    ran = push(hub, model, REPO, "--json")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["sent"] == ["generation_config.json"]
    assert not hub.requests("^PUT")
    expect_whole(hub, model)


FAULTS = {
    "busy while listing": [Fault(r"GET .*/tree/", "503", 2)],
    "rate limit": [Fault(r"preupload", "429", 1)],
    "broken pipe in a part": [Fault(r"PUT /lfs", "drop", 2, skip=1)],
    "a part refused": [Fault(r"PUT /lfs", "500", 1)],
    "commit busy": [Fault(r"POST .*/commit/", "503", 1)],
    "commit dropped": [Fault(r"POST .*/commit/", "drop", 1)],
    "answer to the commit lost": [Fault(r"POST .*/commit/", "lost", 1)],
    "create lost": [Fault(r"POST /api/repos/create", "lost", 1)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_ends_in_one_whole_commit(hub: FakeHub, model: Path, name: str) -> None:
    hub.faults = FAULTS[name]
    ran = push(hub, model, REPO)
    if ran.returncode != 0:  # the client gave up; the same command finishes
        assert "run the same command again" in ran.stderr
        assert push(hub, model, REPO).returncode == 0
    expect_whole(hub, model)
    assert commits(hub, REPO) == 1


REFUSED = {
    "401": ([Fault(r"whoami", "401", 9)], "hub-token"),
    "403": ([Fault(r"repos/create", "403", 9)], "hub-forbidden"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hub_that_says_no_is_a_refusal_before_anything_is_sent(hub: FakeHub, model: Path, name: str) -> None:
    hub.faults, code = REFUSED[name]
    ran = push(hub, model, REPO)
    assert ran.returncode == 3
    assert f"REFUSED {code}" in ran.stderr
    assert not hub.requests("^PUT|/commit/")


def test_a_token_that_only_reads_is_refused_before_anything_is_sent(hub: FakeHub, model: Path) -> None:
    hub.may_write = False
    ran = push(hub, model, REPO)
    assert ran.returncode == 3
    assert "hub-read-only" in ran.stderr
    assert not hub.requests("create|PUT|/commit/")


def test_without_a_token_nothing_is_asked_of_the_hub(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    ran = push(hub, model, REPO, HF_TOKEN="", HF_HOME=str(tmp_path))
    assert ran.returncode == 3
    assert "hub-token" in ran.stderr
    assert hub.log == []


def test_a_file_that_somebody_changed_there_is_sent_again(hub: FakeHub, model: Path) -> None:
    assert push(hub, model, REPO).returncode == 0
    hub.add(REPO, {"config.json": b"{}"})
    ran = push(hub, model, REPO, "--json")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["sent"] == ["config.json"]
    expect_whole(hub, model)


def test_killed_at_any_point_the_next_run_finishes_with_one_commit(hub: FakeHub, model: Path) -> None:
    for requests in (2, 5, 8, 11):
        line, env = command(hub, "push", model, REPO)
        hub.log.clear()
        run = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(hub.log) < requests and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert push(hub, model, REPO).returncode == 0
    expect_whole(hub, model)
    assert commits(hub, REPO) == 1


def test_a_commit_of_somebody_else_in_between_is_built_upon(hub: FakeHub, model: Path) -> None:
    assert push(hub, model, REPO).returncode == 0
    hub.add(REPO, {"notes.txt": b"theirs"})
    (model / "generation_config.json").write_text("{}")
    assert push(hub, model, REPO).returncode == 0
    assert published(hub)["notes.txt"] == b"theirs"
    assert commits(hub, REPO) == 3


def test_what_doctor_calls_an_error_is_not_pushed_without_consent_and_the_card_says_so(
    hub: FakeHub, model: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["FSDPLlamaForSequenceClassification"]}))
    ran = push(hub, model, REPO)
    assert ran.returncode == 3
    assert "architecture-wrapper" in ran.stderr
    assert hub.log == []
    assert push(hub, model, REPO, "--allow", "architecture-wrapper").returncode == 0
    assert "architectures is" in published(hub)["README.md"].decode()


def test_a_broken_file_is_not_pushed(hub: FakeHub, model: Path) -> None:
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])
    ran = push(hub, model, REPO)
    assert ran.returncode == 3
    assert hub.log == []


def test_what_belongs_to_training_and_code_stay_here(hub: FakeHub, model: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "modeling_x.py", ".env"):
        (model / name).write_bytes(b"secret")
    ran = push(hub, model, REPO)
    assert ran.returncode == 0, ran.stderr
    assert not {"training_args.bin", "optimizer.pt", "modeling_x.py", ".env"} & set(published(hub))
    assert "left out" in ran.stdout
    assert push(hub, model, REPO, "--keep-code").returncode == 0
    assert "modeling_x.py" in published(hub)


def test_a_dry_run_lists_and_sends_nothing(hub: FakeHub, model: Path) -> None:
    ran = push(hub, model, REPO, "--dry-run", "--json")
    assert ran.returncode == 0
    assert {f["path"] for f in json.loads(ran.stdout)["files"]} == {*on_disk(model), "README.md"}
    assert hub.log == []


def test_arguments_the_wrong_way_round_are_recognised(hub: FakeHub, model: Path) -> None:
    ran = push(hub, REPO, model)
    assert ran.returncode == 2
    assert f"rlhf-convert push {model} {REPO}" in ran.stderr


def test_a_pull_request_leaves_main_alone(hub: FakeHub, model: Path) -> None:
    ran = push(hub, model, REPO, "--create-pr", "--public")
    assert ran.returncode == 0, ran.stderr
    assert commits(hub, REPO) == 0
    assert not hub.repos[REPO].private
    assert "/discussions/" in ran.stdout


@pytest.mark.slow
def test_the_demo_s_result_goes_to_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    ran = run("demo", "--out", tmp_path / "demo", "--push", REPO)
    assert ran.returncode == 0, ran.stderr
    expect_whole(hub, tmp_path / "demo" / "rm")
    assert commits(hub, REPO) == 1


# The card


def facts(**changes: Any) -> CardFacts:
    receipt = {
        "version": "0.1.0",
        "inputs": {
            "adapter": {"kind": "adapter", "name": "me/adapter", "revision": "a" * 40},
            "source": {"kind": "model", "name": "Qwen/Qwen2.5-7B", "revision": "b" * 40},
        },
        "recipe": {"steps": [{"merge-lora": {"adapters": ["adapter"]}}]},
        "counts": {"copied": 3, "computed": 2, "dropped": 1, "filled": 0},
        "dropped": {"lm_head.weight": "a reward model has no output embedding"},
        "notes": [["changes-numbers", "pad-token", "pad_token_id 1 becomes 2"], ["info", "head", "from the adapter"]],
        "verified": True,
    }
    config = {"architectures": ["Qwen2ForSequenceClassification"]}
    return CardFacts(
        REPO, receipt | changes.pop("receipt", {}), config | changes.pop("config", {}), False, 1000, **changes
    )


def front(card: str) -> dict[str, Any]:
    value = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(value, dict)
    return value


def test_a_card_says_where_the_model_comes_from_and_what_was_done() -> None:
    card = model_card(facts(licence="apache-2.0"))
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": "Qwen/Qwen2.5-7B",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "tags": ["rlhf-convert", "reward-model"],
    }
    for words in ("a" * 40, "merge-lora", "3 copied, 2 computed", "lm\\_head.weight", "pad\\_token\\_id 1 becomes 2"):
        assert words in card
    assert "Head:\n\n- from the adapter" in card
    assert "from transformers import Qwen2ForSequenceClassification" in card


def test_an_existing_card_keeps_its_text_and_its_front_matter() -> None:
    mine = "---\nlicense: mit\nlanguage: [en]\n---\n\n# My model\n\nRead this.\n"
    once = model_card(facts(), mine)
    assert front(once)["license"] == "mit"
    assert front(once)["language"] == ["en"]
    assert "# My model\n\nRead this.\n" in once
    twice = model_card(facts(receipt={"version": "9.9"}), once)
    assert twice.count(BEGIN) == twice.count(END) == 1
    assert "rlhf-convert 9.9" in twice
    assert "rlhf-convert 0.1.0" not in twice


def test_strings_of_inputs_can_not_inject_markup_or_front_matter() -> None:
    evil = "x\n---\nlicense: evil\n---\n<script>alert(1)</script> [a](javascript:b) `rm` | y"
    card = model_card(
        facts(
            receipt={"inputs": {"source": {"kind": "model", "name": evil, "revision": evil}}, "dropped": {evil: evil}},
            config={"architectures": [evil]},
            licence="x\nevil: 1",
        )
    )
    assert "license" not in front(card)
    assert "evil" not in front(card)
    assert "<script>" not in card
    assert re.search(r"(?<!\\)\]\(javascript", card) is None
    assert card.count("\n---\n") == 1
    assert "from transformers import AutoModel\n" in card


def test_the_card_s_snippet_runs(model: Path) -> None:
    card = model_card(CardFacts(str(model), {}, json.loads((model / "config.json").read_text()), False, 1))
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    space: dict[str, Any] = {}
    exec(code[1], space)
    assert torch.equal(space["model"].score.weight, load_file_of(model)["score.weight"])


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_a_folder_without_a_receipt_goes_and_the_card_says_that_there_is_none(hub: FakeHub, model: Path) -> None:
    (model / "rlhf-convert.json").unlink()
    assert push(hub, model, REPO).returncode == 0
    assert "carry no receipt" in published(hub)["README.md"].decode()


@pytest.mark.parametrize("endpoint", ["http://hub.example.com", "ftp://127.0.0.1", "http://127.0.0.1.example.com"])
def test_a_token_is_not_sent_in_the_open(model: Path, endpoint: str, tmp_path: Path) -> None:
    with client_of(SimpleNamespace(url=endpoint), tmp_path / "home"):
        for ran in (run("push", model, REPO), run("inspect", "acme/model")):
            assert ran.returncode == 3
            assert ran.stderr.count("REFUSED hub-endpoint") == 1
