"""Large files that the real hf_xet sends by chunks, into a folder that stands for its store: no network, no account."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fake_hub import TOKEN, FakeHub, Fault, running
from hub_here import commits, on_disk, published

pytest.importorskip("hf_xet")
REPO = "me/rm"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files of a megabyte."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    (folder / "config.json").write_text('{"architectures": ["TheirsForCausalLM"], "model_type": "theirs"}')
    names = {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({f"model.w{number}": torch.randn(512, 512)}, folder / file, metadata={"format": "pt"})
        names[f"model.w{number}"] = file
    index = {"metadata": {"total_size": 2 << 20}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running(FakeHub()) as server:
        yield server


def environment(hub: FakeHub, model: Path) -> dict[str, str]:
    store = model.parent / "store"
    store.mkdir()
    own = hub.by_chunks(store, [p.read_bytes() for p in model.glob("*.safetensors")])
    home = {"HF_HOME": str(model.parent / "hf"), "TMPDIR": str(model.parent)}
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | own | home


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "converter", *map(str, words)]


def run(env: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        command(*words), env=env, cwd=env["TMPDIR"], capture_output=True, text=True, check=False, timeout=120
    )
    assert TOKEN not in ran.stdout + ran.stderr
    return ran


def stored(hub: FakeHub) -> int:
    """Bytes of chunks that were sent."""
    assert hub.xet is not None
    return sum(p.stat().st_size for p in hub.xet.rglob("default.*") if p.suffix != ".tagset")


def expect_whole(hub: FakeHub, model: Path) -> None:
    files = published(hub, REPO)
    assert files.pop("README.md")
    files.pop("rlhf-convert.json", None)
    wanted, index = on_disk(model), "model.safetensors.index.json"
    assert json.loads(files.pop(index)) == json.loads(wanted.pop(index))
    assert files == wanted
    assert commits(hub, REPO) == 1
    assert not hub.requests("^PUT")
    assert 1_500_000 < stored(hub) < 2_200_000


def test_files_that_go_by_chunks_end_in_one_commit_and_none_is_sent_twice(hub: FakeHub, model: Path) -> None:
    env = environment(hub, model)
    hub.faults = [Fault("POST .*/commit/", "403", 1)]
    ran = run(env, "push", model, REPO)
    assert ran.returncode == 3
    assert "hub-forbidden" in ran.stderr
    assert commits(hub, REPO) == 0
    sent = stored(hub)
    ran = run(env, "push", model, REPO)
    assert ran.returncode == 0, ran.stderr
    expect_whole(hub, model)
    assert stored(hub) == sent


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "lost", "token"])
def test_an_output_on_the_hub_goes_by_chunks_too(hub: FakeHub, model: Path, fault: str) -> None:
    env = environment(hub, model)
    faults = {"none": [], "lost": [Fault("POST .*/commit/", "lost", 1)], "token": [Fault("xet-write-token", "503", 1)]}
    hub.faults = faults[fault]
    ran = run(env, "reshard", model, f"hf://{REPO}")
    if ran.returncode != 0:
        assert ran.returncode == 3
        ran = run(env, "reshard", model, f"hf://{REPO}")
    assert ran.returncode == 0, ran.stderr
    expect_whole(hub, model)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["push", "reshard"])
def test_killed_while_chunks_are_sent_the_next_run_finishes_with_one_commit(
    hub: FakeHub, model: Path, verb: str
) -> None:
    env = environment(hub, model)
    words = ("push", model, REPO) if verb == "push" else ("reshard", model, f"hf://{REPO}")
    for requests in (9, 13, 15):
        hub.log.clear()
        child = subprocess.Popen(
            command(*words), env=env, cwd=env["TMPDIR"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while len(hub.log) < requests and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
    ran = run(env, *words)
    assert ran.returncode == 0, ran.stderr
    expect_whole(hub, model)
