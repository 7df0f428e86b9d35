"""Outputs below a folder of a bucket: the bytes of a folder's, room here for one file, killed and gone on.

pytest -m remote, with s3fs and moto's server: pip install 'rlhf-convert[remote]' 'moto[server]'
"""

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

import converter
from converter.errors import Refused
from converter.shipped import shipped
from hub_here import run
from store_here import BUCKET, SECRET, Fault, Store, running

pytestmark = [pytest.mark.remote, pytest.mark.filterwarnings("ignore")]

FIXTURES = shipped("fixtures")
BASE, ADAPTER = FIXTURES / "tiny-qwen2-base", FIXTURES / "tiny-reward-adapter"
SMALL = ("--max-shard-size", "20KB")


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with running() as made:
        yield made


@pytest.fixture
def store(
    server: Store, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("home")))
    server.faults.clear()
    server.log.clear()
    return server


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same merge writes to a folder."""
    out = tmp_path_factory.mktemp("local") / "out"
    converter.merge_lora(ADAPTER, out, base=BASE, max_shard_size="20KB")
    return {p.name: p.read_bytes() for p in out.iterdir()}


def merge(out: str, *more: str) -> subprocess.CompletedProcess[str]:
    return run("merge-lora", ADAPTER, out, "--base", BASE, *SMALL, *more)


def expect_equal(found: dict[str, bytes], local: dict[str, bytes]) -> None:
    """All files byte by byte; of the receipt what does not name the place."""
    receipt = "rlhf-convert.json"
    assert {n: c for n, c in found.items() if n != receipt} == {n: c for n, c in local.items() if n != receipt}
    assert json.loads(found[receipt])["files"] == json.loads(local[receipt])["files"]


def test_a_merge_to_a_bucket_has_the_bytes_of_one_to_a_folder_and_leaves_nothing_here(
    store: Store, local: dict[str, bytes], tmp_path: Path
) -> None:
    done = merge(f"s3://{BUCKET}/merged")
    assert done.returncode == 0, done.stderr
    expect_equal(store.files("merged"), local)
    assert f"wrote    s3://{BUCKET}/merged" in done.stdout
    assert f"rlhf-convert inspect s3://{BUCKET}/merged" in done.stdout
    assert "from_pretrained" not in done.stdout
    assert os.listdir(tmp_path) == []
    sent = [r.partition("?")[0].rpartition("/")[2] for r in store.requests(r"^PUT ")]
    weights = sorted(n for n in local if n.endswith(".safetensors"))
    assert sent[: len(weights)] == weights
    assert sent[-3:] == ["model.safetensors.index.json", "rlhf-convert.json", "config.json"]
    assert run("doctor", f"s3://{BUCKET}/merged").returncode == 0


def test_a_folder_that_holds_objects_is_refused_before_anything_is_read(store: Store, tmp_path: Path) -> None:
    store.put(ADAPTER, "taken")
    before = store.files("taken")
    done = merge(f"s3://{BUCKET}/taken")
    assert done.returncode == 3
    assert "output-exists" in done.stderr
    assert store.files("taken") == before
    assert merge(f"s3://{BUCKET}/taken", "--overwrite").returncode == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["503", "500"])
def test_faults_between_are_asked_again(store: Store, local: dict[str, bytes], kind: str) -> None:
    store.faults += [Fault("PUT .*safetensors", kind, count=2), Fault("PUT .*config", kind, count=1)]
    done = merge(f"s3://{BUCKET}/faulty-{kind}")
    assert done.returncode == 0, done.stderr
    assert sum(f.count for f in store.faults) == 0
    expect_equal(store.files(f"faulty-{kind}"), local)


def test_a_store_that_takes_nothing_more_is_refused_and_the_same_command_goes_on(
    store: Store, local: dict[str, bytes], tmp_path: Path
) -> None:
    store.faults.append(Fault("PUT .*safetensors", "503", count=10_000, skip=2))
    done = merge(f"s3://{BUCKET}/later")
    assert done.returncode == 3
    assert "store-write" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    there = store.files("later")
    assert 0 < len(there) < len(local)
    assert "config.json" not in there
    store.faults.clear()
    store.log.clear()
    again = merge(f"s3://{BUCKET}/later")
    assert again.returncode == 0, again.stderr
    expect_equal(store.files("later"), local)
    sent = {r.partition("?")[0].rpartition("/")[2] for r in store.requests(r"^PUT ")}
    assert sent == local.keys() - there.keys()
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_killed_goes_on_with_what_was_sent(store: Store, local: dict[str, bytes], tmp_path: Path) -> None:
    place = f"s3://{BUCKET}/killed"
    words = ["merge-lora", str(ADAPTER), place, "--base", str(BASE), *SMALL]
    process = subprocess.Popen([sys.executable, "-m", "converter", *words], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(store.requests(r"^PUT .*safetensors")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "config.json" not in store.files("killed")
    again = merge(place)
    assert again.returncode == 0, again.stderr
    expect_equal(store.files("killed"), local)
    assert os.listdir(tmp_path) == []


def test_an_object_that_another_run_wrote_meanwhile_is_refused(store: Store, tmp_path: Path) -> None:
    store.faults.append(Fault("PUT .*safetensors", "503", count=10_000, skip=2))
    assert merge(f"s3://{BUCKET}/shared").returncode == 3
    store.faults.clear()
    store.put(ADAPTER, "shared")
    done = merge(f"s3://{BUCKET}/shared")
    assert done.returncode == 3
    assert "output-exists" in done.stderr
    assert "adapter_config.json" in done.stderr


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_read(store: Store, tmp_path: Path) -> None:
    done = merge("s3://no-such-bucket/x")
    assert done.returncode == 3
    assert "there is no such bucket" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_large_file_goes_in_parts_and_comes_back_whole(store: Store, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from small_models import numbers, save_model

    given = {"w": numbers(6000, 2000)}
    model = save_model(tmp_path / "model", given)
    converter.reshard(model, f"s3://{BUCKET}/parts", allow=("tensors-missing", "tensors-unexpected"))
    assert len(store.requests(r"PUT .*partNumber=\d")) >= 2
    (tmp_path / "back.safetensors").write_bytes(store.files("parts")["model.safetensors"])
    assert torch.equal(load_file(tmp_path / "back.safetensors")["w"], given["w"])


def test_python_is_told_what_was_stored(store: Store) -> None:
    done = converter.merge_lora(ADAPTER, f"s3://{BUCKET}/python", base=BASE)
    assert done.stored is not None
    assert set(done.stored.names) == store.files("python").keys()
    with pytest.raises(Refused, match="lie there already"):
        converter.merge_lora(ADAPTER, f"s3://{BUCKET}/python", base=BASE)
