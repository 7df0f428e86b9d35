"""What lies on the Hub is compared by content: a file of the same name and size is not taken for the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub, running
from hub_here import client_of, on_disk, published, run
from verify_folders import make_rm

REPO = "me/rm"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with running(FakeHub()) as server, client_of(server, tmp_path):
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    source = make_rm(tmp_path / "source")
    done = run("reshard", source, tmp_path / "rm", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    return tmp_path / "rm"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_the_same_size_and_other_content_is_sent_again(name: str, hub: FakeHub, model: Path) -> None:
    assert run("push", model, REPO).returncode == 0
    whole = on_disk(model)
    changed = bytearray(whole[name])
    changed[-2] ^= 1
    hub.add(REPO, {name: bytes(changed)})
    ran = run("push", model, REPO, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["sent"] == [name]
    assert published(hub, REPO)[name] == whole[name]


def test_weights_of_another_model_beside_are_refused_and_removed_with_consent(hub: FakeHub, model: Path) -> None:
    stale = "model-00001-of-00002.safetensors"
    hub.add(REPO, {stale: b"old", "pytorch_model.bin": b"older", "notes.txt": b"kept"})
    ran = run("push", model, REPO)
    assert (ran.returncode, "hub-stale-weights" in ran.stderr) == (3, True)
    assert stale in published(hub, REPO)
    assert "model.safetensors" not in published(hub, REPO)
    assert run("push", model, REPO, "--allow", "hub-stale-weights").returncode == 0
    assert {stale, "pytorch_model.bin"} & published(hub, REPO).keys() == set()
    assert published(hub, REPO)["notes.txt"] == b"kept"
