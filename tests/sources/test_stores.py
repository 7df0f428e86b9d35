"""Models in a store that speaks S3, read where they lie: what is asked of it, what comes of faults, what is printed.

pytest -m remote, with s3fs and moto's server: pip install 'rlhf-convert[remote]' 'moto[server]'
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import converter
from converter.core.files import sparse
from converter.errors import Refused, UsageError
from converter.shipped import shipped
from converter.sources.hub import mirror as hub_mirror
from converter.sources.locate import resolve
from converter.sources.store_names import store_name
from hub_here import run
from small_models import numbers, open_model, plan_of, save_model, written
from store_here import BUCKET, SECRET, Fault, Store, running

pytestmark = [pytest.mark.remote, pytest.mark.filterwarnings("ignore")]

FIXTURES = shipped("fixtures")
BASE, ADAPTER = f"s3://{BUCKET}/base", f"s3://{BUCKET}/adapter"


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    with running() as made:
        made.put(FIXTURES / "tiny-qwen2-base", "base")
        made.put(FIXTURES / "tiny-reward-adapter", "adapter")
        yield made


@pytest.fixture
def store(server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("TMPDIR", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(home))
    hub_mirror.workspace.cache_clear()
    server.faults.clear()
    server.log.clear()
    server.sent_bytes = server.most_in_flight = 0
    yield server
    hub_mirror.forget()
    hub_mirror.workspace.cache_clear()


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a merge of the folders makes."""
    out = tmp_path_factory.mktemp("merged") / "out"
    converter.merge_lora(FIXTURES / "tiny-reward-adapter", out, base=FIXTURES / "tiny-qwen2-base")
    return weights(out)


def test_inspect_and_doctor_say_of_a_store_what_they_say_of_the_folder(store: Store) -> None:
    here, there = run("inspect", FIXTURES / "tiny-qwen2-base"), run("inspect", BASE)
    assert there.returncode == here.returncode == 0, there.stderr
    assert there.stdout.splitlines()[1:4] == here.stdout.splitlines()[1:4]
    assert run("doctor", ADAPTER).returncode == run("doctor", FIXTURES / "tiny-reward-adapter").returncode


def test_a_merge_from_a_store_has_the_bytes_of_one_from_folders(
    store: Store, merged: dict[str, bytes], tmp_path: Path
) -> None:
    done = run("merge-lora", ADAPTER, tmp_path / "out", "--base", BASE)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == merged
    assert "which are what they were" in done.stdout
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert str(tmp_path) not in json.dumps(receipt)


@pytest.mark.parametrize("kind", ["503", "500", "cut"])
def test_faults_between_are_asked_again_and_change_no_byte(
    store: Store, merged: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    store.faults += [Fault("GET .*safetensors", kind, count=2), Fault("GET .*list-type", "503", count=1)]
    done = run("merge-lora", ADAPTER, tmp_path / "out", "--base", BASE)
    assert done.returncode == 0, done.stderr
    assert sum(f.count for f in store.faults) == 0
    assert weights(tmp_path / "out") == merged


def test_a_store_that_fails_for_good_is_refused_without_a_word_of_the_secret(store: Store, tmp_path: Path) -> None:
    store.faults.append(Fault(r"GET .*\.safetensors", "503", count=10_000))
    done = run("merge-lora", ADAPTER, tmp_path / "out", "--base", BASE)
    assert done.returncode == 3
    assert "store-read" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_an_object_that_is_written_again_meanwhile_is_refused(store: Store, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"w": numbers(64, 64)})
    store.put(model, "changing")
    plan = plan_of(open_model(resolve(f"s3://{BUCKET}/changing").path))
    save_model(tmp_path / "second", {"w": numbers(64, 64, seed=1)})
    store.put(tmp_path / "second", "changing")
    with pytest.raises(Refused, match="written again") as caught:
        written(plan, tmp_path / "out")
    assert caught.value.code == "input-changed"
    assert not (tmp_path / "out").exists()


def test_several_ranges_are_in_flight_and_little_of_the_model_is_on_the_disk(store: Store, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"w": numbers(4096, 4096)})
    store.put(model, "large")
    written(plan_of(open_model(resolve(f"s3://{BUCKET}/large").path)), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(model)
    assert store.most_in_flight >= 2
    folder = resolve(f"s3://{BUCKET}/large").path
    on_disk = sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())
    assert on_disk < sum(p.stat().st_size for p in model.iterdir()) / 2


def test_a_base_that_an_adapter_records_in_a_store_is_not_fetched_unasked(store: Store, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "tiny-reward-adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": BASE}))
    done = run("merge-lora", adapter, tmp_path / "out")
    assert done.returncode != 0
    assert store.log == []


def test_a_name_without_anything_below_it_is_missing(store: Store) -> None:
    with pytest.raises(Refused, match="nothing below") as caught:
        resolve(f"s3://{BUCKET}/nothing")
    assert caught.value.code == "path-missing"
    assert sparse.known() == []


@pytest.mark.parametrize("text", ["s3://", "s3:///x", "s3://key:secret@bucket/x", "s3://bucket/../x", "s3://bucket//x"])
def test_a_name_that_is_none_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="bucket and a folder") as caught:
        store_name(text)
    assert "secret@" not in str(caught.value)
