"""Outputs that go to a Hub on loopback without being on the disk: equal to a local run, one commit, resumable."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from converter.sources.hub import mirror as hub_mirror
from fake_hub import FakeHub, Fault, running
from hub_here import client_of, commits, on_disk, published, run

SOURCE, TARGET = "org/model", "me/rm"
OUT = f"hf://{TARGET}"
LIMIT = ("--max-shard-size", "300KB")


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub-write") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2, vocab_size=500, num_labels=1,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder, max_shard_size="400KB")
    return folder


@pytest.fixture
def hub(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with running(FakeHub(multipart=100_000)) as server, client_of(server, tmp_path / "home"):
        server.add(SOURCE, on_disk(local))
        yield server


def expected(local: Path, folder: Path, *options: str) -> dict[str, bytes]:
    """What the same conversion writes to a folder, but for the receipt."""
    assert run("reshard", local, folder, *options).returncode == 0
    return {n: c for n, c in on_disk(folder).items() if n != "rlhf-convert.json"}


def found(hub: FakeHub) -> dict[str, bytes]:
    """What is in the repository, but for receipt and card, which a whole one has."""
    files = published(hub, TARGET)
    assert files.pop("README.md").startswith(b"---\n")
    assert json.loads(files.pop("rlhf-convert.json"))["inputs"]["source"]["name"]
    return files


def left_here() -> list[str]:
    return sorted(os.listdir())


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_an_output_on_the_hub_is_one_commit_equal_to_the_folder_of_a_local_run(
    hub: FakeHub, local: Path, tmp_path: Path, source: str
) -> None:
    ran = run("reshard", local if source == "folder" else SOURCE, OUT, *LIMIT, "--json")
    assert ran.returncode == 0, ran.stderr
    assert found(hub) == expected(local, tmp_path / "local", *LIMIT)
    assert commits(hub, TARGET) == 1
    assert hub.repos[TARGET].private
    assert left_here() == []
    assert re.fullmatch(rf"{hub.url}/{TARGET}/commit/[0-9a-f]{{40}}", json.loads(ran.stdout)["url"])
    assert not (tmp_path / "home" / "hub").exists()


def test_run_again_nothing_is_sent_and_no_commit_is_made(hub: FakeHub, local: Path) -> None:
    assert run("reshard", local, OUT, *LIMIT).returncode == 0
    hub.log.clear()
    ran = run("reshard", local, OUT, *LIMIT)
    assert ran.returncode == 0, ran.stderr
    assert commits(hub, TARGET) == 1
    assert not hub.requests("^PUT|/commit/")


def test_files_that_stay_as_they_are_are_copied_by_the_hub(hub: FakeHub, local: Path) -> None:
    hub.sent_bytes = 0
    ran = run("reshard", SOURCE, OUT, "--json")
    assert ran.returncode == 0, ran.stderr
    shards = sorted(p.name for p in local.glob("*.safetensors"))
    assert json.loads(ran.stdout)["copied"] == shards
    assert not hub.requests("^PUT")
    assert hub.sent_bytes < 200_000
    assert {n: c for n, c in found(hub).items() if n in shards} == {n: (local / n).read_bytes() for n in shards}


@pytest.mark.parametrize("kind", ["403", "500", "drop"])
def test_where_the_hub_does_not_copy_the_files_are_sent(hub: FakeHub, local: Path, kind: str) -> None:
    hub.faults = [Fault("lfs-files/duplicate", kind, 99)]
    ran = run("reshard", SOURCE, OUT, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["copied"] == []
    assert all(found(hub)[p.name] == p.read_bytes() for p in local.glob("*.safetensors"))


def test_the_screen_says_which_files_were_copied_and_which_digests_are_known(hub: FakeHub, local: Path) -> None:
    hub.faults = [Fault("lfs-files/duplicate", "403", 1)]
    ran = run("reshard", SOURCE, OUT)
    copied = len(list(local.glob("*.safetensors"))) - 1
    assert f"{copied} copied there from the source" in ran.stdout
    assert "read in part" not in ran.stdout


def test_a_conversion_within_one_repository_copies_what_stays(hub: FakeHub, local: Path) -> None:
    hub.add(TARGET, on_disk(local))
    before = commits(hub, TARGET)
    ran = run("reshard", TARGET, OUT)
    assert ran.returncode == 0, ran.stderr
    assert commits(hub, TARGET) == before + 1
    assert not hub.requests("^PUT")


FAULTS = {
    "listing busy": [Fault(r"GET .*/tree/", "503", 2)],
    "rate limit": [Fault(r"preupload", "429", 1)],
    "a part dropped": [Fault(r"PUT /lfs", "drop", 2, skip=2)],
    "a part refused": [Fault(r"PUT /lfs", "500", 1, skip=1)],
    "the upload refused": [Fault(r"PUT /lfs", "400", 1, skip=3)],
    "the completion lost": [Fault(r"POST /lfs-complete", "lost", 1, skip=1)],
    "commit busy": [Fault(r"POST .*/commit/", "503", 1)],
    "commit dropped": [Fault(r"POST .*/commit/", "drop", 1)],
    "answer to the commit lost": [Fault(r"POST .*/commit/", "lost", 1)],
    "commit refused for long": [Fault(r"POST .*/commit/", "503", 5)],
    "create lost": [Fault(r"POST /api/repos/create", "lost", 1)],
    "reading cut": [Fault(r"GET .*/resolve/.*safetensors", "short", 2, skip=5)],
    "reading refused for a while": [Fault(r"GET .*/resolve/.*safetensors", "404", 1, skip=14)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_ends_in_one_whole_commit_after_at_most_one_more_run(
    hub: FakeHub, local: Path, tmp_path: Path, name: str
) -> None:
    hub.faults = FAULTS[name]
    ran = run("reshard", SOURCE, OUT, *LIMIT)
    if ran.returncode != 0:
        assert ran.returncode == 3
        assert TARGET not in hub.repos or commits(hub, TARGET) == 0
        hub_mirror.forget()
        again = run("reshard", SOURCE, OUT, *LIMIT)
        assert again.returncode == 0, again.stderr
    assert found(hub) == expected(local, tmp_path / "local", *LIMIT)
    assert commits(hub, TARGET) == 1
    assert left_here() == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "lost", "500", "503", "429", "404", "403", "401", "corrupt", "short"])
def test_whichever_request_fails_the_repository_has_one_whole_commit_after_at_most_one_more_run(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    wanted = expected(local, tmp_path / "local", *LIMIT)
    failed = 0
    for number in range(200):
        here = tmp_path / str(number)
        (here / "home").mkdir(parents=True)
        monkeypatch.chdir(here)
        with running(FakeHub(multipart=100_000)) as hub, client_of(hub, here / "home"):
            hub.add(SOURCE, on_disk(local))
            hub.faults = [Fault(".", kind, 1, skip=number)]
            ran = run("reshard", SOURCE, OUT, *LIMIT)
            if hub.faults[0].count:
                break  # fewer requests than that
            if ran.returncode != 0:
                failed += 1
                if TARGET in hub.repos and commits(hub, TARGET):
                    assert "the commit was made" in ran.stderr
                    assert found(hub) == wanted
                hub_mirror.forget()
                ran = run("reshard", SOURCE, OUT, *LIMIT)
            assert ran.returncode == 0, (number, ran.stderr)
            assert found(hub) == wanted
            assert commits(hub, TARGET) == 1
    assert 30 < number < 199
    assert kind not in ("401", "403", "404") or failed > 10


def test_what_was_sent_before_a_fault_is_not_sent_again(hub: FakeHub) -> None:
    hub.faults = [Fault(r"POST .*/commit/", "503", 99)]
    assert run("reshard", SOURCE, OUT, *LIMIT).returncode == 3
    assert hub.requests("^PUT")
    hub.faults.clear()
    hub.log.clear()
    hub_mirror.forget()
    ran = run("reshard", SOURCE, OUT, *LIMIT)
    assert ran.returncode == 0, ran.stderr
    assert "written by an earlier run" in ran.stderr
    assert not hub.requests("^PUT")
    assert commits(hub, TARGET) == 1


def test_what_the_hub_has_forgotten_meanwhile_is_sent_again(hub: FakeHub, local: Path, tmp_path: Path) -> None:
    hub.faults = [Fault(r"POST .*/commit/", "503", 99)]
    assert run("reshard", SOURCE, OUT, *LIMIT).returncode == 3
    hub.faults.clear()
    hub.repos[TARGET].objects.clear()
    assert run("reshard", SOURCE, OUT, *LIMIT).returncode == 0
    assert found(hub) == expected(local, tmp_path / "local", *LIMIT)


REFUSED = {
    "401": ([Fault(r"whoami", "401", 9)], "hub-token"),
    "403": ([Fault(r"repos/create", "403", 9)], "hub-forbidden"),
    "corrupt source": ([Fault(r"resolve/.*00002-of", "corrupt", 1, skip=1)], "download-corrupt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_leaves_the_repository_without_a_commit(hub: FakeHub, name: str) -> None:
    hub.faults, code = REFUSED[name]
    ran = run("reshard", SOURCE, OUT, *LIMIT)
    assert ran.returncode == 3
    assert code in ran.stderr
    assert TARGET not in hub.repos or commits(hub, TARGET) == 0


def test_a_token_that_only_reads_is_refused_before_anything_is_read(hub: FakeHub) -> None:
    hub.may_write = False
    assert "hub-read-only" in run("reshard", SOURCE, OUT).stderr
    assert not hub.requests("resolve|create|PUT")


def test_weights_of_another_model_are_not_left_beside_the_new_ones(hub: FakeHub, local: Path) -> None:
    hub.add(TARGET, {"model.safetensors": b"theirs", "notes.txt": b"theirs"})
    ran = run("reshard", local, OUT, *LIMIT)
    assert ran.returncode == 3
    assert "hub-stale-weights" in ran.stderr
    assert not hub.requests("^PUT")
    assert run("reshard", local, OUT, *LIMIT, "--allow", "hub-stale-weights").returncode == 0
    files = published(hub, TARGET)
    assert "model.safetensors" not in files
    assert files["notes.txt"] == b"theirs"
    assert commits(hub, TARGET) == 2


def test_the_card_that_the_repository_has_is_extended(hub: FakeHub, local: Path) -> None:
    hub.add(TARGET, {"README.md": b"---\nlicense: mit\n---\n\n# Mine\n\nRead this.\n"})
    assert run("reshard", local, OUT).returncode == 0
    card = published(hub, TARGET)["README.md"].decode()
    assert "# Mine\n\nRead this.\n" in card
    assert "license: mit" in card
    assert "How this was made" in card


def test_a_dry_run_sends_nothing(hub: FakeHub, local: Path) -> None:
    ran = run("reshard", local, OUT, "--dry-run")
    assert ran.returncode == 0, ran.stderr
    assert hub.log == []
    assert left_here() == []


def test_owner_slash_name_as_output_is_a_folder(hub: FakeHub, local: Path) -> None:
    assert run("reshard", local, "me/rm").returncode == 0
    assert (Path("me") / "rm" / "config.json").is_file()
    assert hub.log == []


@pytest.mark.parametrize("out", ["hf://", "hf://rm", "hf://me/rm/x"])
def test_an_output_that_is_no_repository_is_a_usage_error(hub: FakeHub, local: Path, out: str) -> None:
    assert run("reshard", local, out).returncode == 2


def test_push_to_hub_writes_the_folder_and_pushes_it(hub: FakeHub, local: Path) -> None:
    ran = run("reshard", local, "out", "--push-to-hub", TARGET, "--public")
    assert ran.returncode == 0, ran.stderr
    files = published(hub, TARGET)
    files.pop("README.md")
    assert files == on_disk(Path("out"))
    assert not hub.repos[TARGET].private


def test_push_to_hub_without_a_token_is_refused_before_the_work(hub: FakeHub, local: Path) -> None:
    ran = run("reshard", local, "out", "--push-to-hub", TARGET, HF_TOKEN="")
    assert ran.returncode == 3
    assert "hub-token" in ran.stderr
    assert left_here() == []


def test_a_disk_that_is_too_small_is_told_with_the_places_that_need_little_here(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "huge"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["TheirsForCausalLM"], "model_type": "theirs"}')
    size = 1 << 43  # a file of 8.8 TB, of which the header is on the disk
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    ran = run("reshard", folder, "out")
    assert ran.returncode == 3
    assert "no-space" in ran.stderr
    assert "have OUT on the Hub (hf://...) or in a store (s3://...)" in " ".join(ran.stderr.split())
    assert "OWNER" not in ran.stderr
    assert hub.log == []


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Six files of four megabytes, eight tensors each."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["TheirsForCausalLM"], "model_type": "theirs"}')
    torch.manual_seed(1)
    names: dict[str, str] = {}
    for number in range(1, 7):
        file = f"model-{number:05d}-of-00006.safetensors"
        tensors = {f"model.layers.{number}.w{n}.weight": torch.randn(256, 512) for n in range(8)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 6 * 8 * 256 * 512 * 4}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def allocated(*folders: Path) -> int:
    """Bytes of disk that the files below hold."""
    total = 0
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(root, name)).st_blocks * 512
                except FileNotFoundError:
                    continue
    return total


def test_from_hub_to_hub_no_more_than_two_files_are_on_the_disk_at_any_time(
    hub: FakeHub, large: Path, tmp_path: Path
) -> None:
    hub.add("org/large", on_disk(large))
    limit = ("--max-shard-size", "3MB")
    wanted = expected(large, tmp_path / "local", *limit)
    shard = max(len(c) for n, c in wanted.items() if n.endswith(".safetensors"))
    assert sum(map(len, wanted.values())) > 8 * shard
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, allocated(tmp_path / "home", tmp_path / "work"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    ran = run("reshard", "org/large", OUT, *limit, "-j", "1")  # bytes in order, so that digests are known
    done.set()
    watcher.join()
    assert ran.returncode == 0, ran.stderr
    assert shard // 2 < most < 2 * shard
    assert found(hub) == wanted
    assert "8 whole, equal in digest" in ran.stdout


@pytest.mark.signals
@pytest.mark.slow
def test_killed_or_interrupted_at_any_point_the_next_run_finishes_with_one_commit(
    hub: FakeHub, large: Path, tmp_path: Path
) -> None:
    hub.add("org/large", on_disk(large))
    wanted = expected(large, tmp_path / "local", "--max-shard-size", "3MB")
    line = [sys.executable, "-m", "converter", "reshard", "org/large", OUT, "--max-shard-size", "3MB"]
    env = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path / "home")}
    for requests in (8, 25, 40, 60, 75):
        hub.log.clear()
        child = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(hub.log) < requests and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGINT if requests % 2 else signal.SIGKILL)
        child.wait()
    ran = subprocess.run(line, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert found(hub) == wanted
    assert commits(hub, TARGET) == 1
    assert left_here() == []
