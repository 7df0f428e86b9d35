"""Models on a Hub, read in parts through the real client: what is transferred, what comes of faults, what is kept."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from big_headers import llama_70b
from converter.core.files import sparse
from converter.core.files.opening import read_exact
from converter.core.files.origins import Origin
from converter.errors import Refused, UsageError
from converter.sources.hub import download as hub_download
from converter.sources.hub import mirror as hub_mirror
from converter.sources.locate import hub_name, resolve
from fake_hub import FakeHub, Fault, Stored, running
from hub_here import client_of, on_disk, run

MODEL, ADAPTER = "org/model", "org/adapter"


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several files with a tokenizer larger than a block, and an adapter."""
    folder = tmp_path_factory.mktemp("hub-read")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=512, num_hidden_layers=6, num_attention_heads=2, vocab_size=600
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "model", max_shard_size="600KB")
    (folder / "model" / "tokenizer.json").write_text(json.dumps({"words": [str(n) for n in range(30_000)]}))
    (folder / "model" / "README.md").write_text("# Theirs\n")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of an old name
        get_peft_model(base, lora).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def hub(local: Path, tmp_path: Path) -> Iterator[FakeHub]:
    with running(FakeHub()) as server, client_of(server, tmp_path / "home"):
        (tmp_path / "home").mkdir()
        server.add(MODEL, on_disk(local / "model"))
        server.add(ADAPTER, on_disk(local / "adapter"))
        yield server


def left_behind(home: Path) -> list[Path]:
    """Files that reading in parts left once the process is over."""
    hub_mirror.forget()
    return [p for p in home.rglob("*") if p.is_file() and p.suffix != ".lock"]


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_inspect_of_a_model_on_the_hub_says_what_it_says_of_the_folder_and_reads_headers_only(
    hub: FakeHub, local: Path, tmp_path: Path
) -> None:
    here, there = run("inspect", local / "model"), run("inspect", MODEL)
    assert there.returncode == here.returncode == 0, there.stderr
    assert there.stdout.splitlines()[1:4] == here.stdout.splitlines()[1:4]
    shards = len(list((local / "model").glob("*.safetensors")))
    assert shards >= 5
    assert hub.sent_bytes < shards * (sparse.UNIT + 1000) + 20_000 < size(local / "model") / 10
    assert left_behind(tmp_path / "home") == []


class OnDisk:
    """The content of a file that is too large to be held."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return self.path.stat().st_size

    def __getitem__(self, part: slice) -> bytes:
        with self.path.open("rb") as file:
            file.seek(part.start)
            return file.read(part.stop - part.start)


@pytest.mark.parametrize("verb", ["inspect", "doctor"])
def test_a_70b_model_on_the_hub_is_examined_by_reading_less_than_a_megabyte(
    hub: FakeHub, tmp_path: Path, verb: str
) -> None:
    folder = llama_70b(tmp_path / "70b")
    weights = {p.name: p for p in folder.glob("*.safetensors")}
    hub.add("org/70b", {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in weights})
    for name, path in weights.items():
        stored = Stored(OnDisk(path), True)  # type: ignore[arg-type]
        stored.__dict__ |= {"sha256": hashlib.sha256(name.encode()).hexdigest(), "blob_id": "0" * 40}
        hub.repos["org/70b"].branches["main"][-1].files[name] = stored
    hub.sent_bytes = 0
    ran = run(verb, "org/70b")
    assert ran.returncode == 0, ran.stderr
    assert verb == "doctor" or "70.6 B parameters in 723 tensors" in ran.stdout
    assert 100_000 < hub.sent_bytes < 1_000_000


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}@main", f"hf://{MODEL}", f"hf://{MODEL}@main"])
def test_every_spelling_of_a_model_on_the_hub_is_accepted(hub: FakeHub, name: str) -> None:
    assert run("doctor", name).returncode == 0
    assert run("inspect", name).returncode == 0
    assert run("reshard", name, "out", "--dry-run").returncode == 0


def test_the_commit_is_the_one_that_was_asked_for(hub: FakeHub, local: Path) -> None:
    first = hub.repos[MODEL].branches["main"][-1].oid
    config = json.loads((local / "model" / "config.json").read_text())
    hub.add(MODEL, {"config.json": json.dumps(config | {"vocab_size": 601}).encode()})
    assert "vocabulary 600" in run("inspect", f"{MODEL}@{first}").stdout
    assert "vocabulary 601" in run("inspect", MODEL).stdout
    assert run("inspect", f"{MODEL}@{'0' * 40}").returncode == 3


def test_what_is_read_is_of_one_commit_though_the_branch_moves_meanwhile(hub: FakeHub, local: Path) -> None:
    found = resolve(MODEL, in_parts=True)
    hub.add(MODEL, dict.fromkeys(on_disk(local / "model"), b"{}"))
    assert found.revision is not None
    for name, content in on_disk(local / "model").items():
        fd = (found.path / name).open("rb")
        with fd:
            assert read_exact(fd.fileno(), 0, len(content), file=name) == content
    assert not hub.requests("resolve/main")


@pytest.mark.parametrize("verb", ["reshard", "merge-lora"])
def test_a_conversion_from_the_hub_equals_that_of_the_folder_and_leaves_the_cache_alone(
    hub: FakeHub, local: Path, tmp_path: Path, verb: str
) -> None:
    sources: dict[str, tuple[list[str], list[str | Path], list[str]]] = {
        "reshard": ([MODEL], [local / "model"], ["--dtype", "bf16", "--max-shard-size", "700KB"]),
        "merge-lora": ([ADAPTER, "--base", MODEL], [local / "adapter", "--base", local / "model"], []),
    }
    there, here, more = sources[verb]
    assert run(verb, here[0], tmp_path / "a", *here[1:], *more).returncode == 0
    ran = run(verb, there[0], tmp_path / "b", *there[1:], *more)
    assert ran.returncode == 0, ran.stderr
    one, two = on_disk(tmp_path / "a"), on_disk(tmp_path / "b")
    assert one.pop("rlhf-convert.json") != two.pop("rlhf-convert.json")
    assert one == two
    assert "tokenizer.json" in one
    assert "from Hub" in ran.stdout
    assert not (tmp_path / "home" / "hub").exists()
    assert left_behind(tmp_path / "home") == []


def test_diff_of_two_commits_reads_nothing_of_files_that_are_the_same(hub: FakeHub) -> None:
    first = hub.repos[MODEL].branches["main"][-1].oid
    hub.add(MODEL, {"generation_config.json": b'{"temperature": 2.0}'})
    ran = run("diff", f"{MODEL}@{first}", MODEL)
    assert ran.returncode == 1
    assert "differs" in ran.stdout
    assert hub.sent_bytes < 1_000_000


PASSING = {
    "busy": [Fault(r"GET .*/resolve/", "503", 2)],
    "rate limit": [Fault(r"GET .*/resolve/", "429", 1)],
    "dropped": [Fault(r"GET .*/resolve/.*safetensors", "drop", 2, skip=3)],
    "short": [Fault(r"GET .*/resolve/.*safetensors", "short", 2, skip=2)],
    "listing busy": [Fault(r"GET .*/tree/", "503", 1)],
    "a config that came broken": [Fault(r"GET .*/resolve/.*/config.json", "corrupt", 1)],
}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_while_reading_is_not_seen_in_the_output(
    hub: FakeHub, local: Path, tmp_path: Path, name: str
) -> None:
    hub.faults = PASSING[name]
    ran = run("reshard", MODEL, tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    assert all(f.count == 0 for f in hub.faults)
    weights = {n: c for n, c in on_disk(tmp_path / "out").items() if n.endswith(".safetensors")}
    assert weights == {n: c for n, c in on_disk(local / "model").items() if n.endswith(".safetensors")}


REFUSED = {
    "a config that is always broken": ([Fault(r"resolve/.*/config.json", "corrupt", 99)], "download-corrupt"),
    "bytes of weights that changed on the way": (
        [Fault(r"GET .*/resolve/.*00002-of", "corrupt", 1, skip=1)],
        "download-corrupt",
    ),
    "a server that knows no ranges": ([Fault(r"GET .*/resolve/.*safetensors", "whole", 99)], "hub-range"),
    "another commit": ([Fault(r"GET .*/resolve/.*safetensors", "moved", 99)], "hub-range"),
    "gone": ([Fault(r"GET .*/resolve/.*safetensors", "404", 99)], "hub-download"),
    "forbidden": ([Fault(r"GET .*/resolve/", "403", 99)], "hub-download"),
    "never there": ([Fault(r"GET .*/resolve/", "503", 99)], "hub-download"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_trusted_is_refused_and_nothing_is_published(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.faults, code = REFUSED[name]
    ran = run("reshard", MODEL, tmp_path / "out")
    assert ran.returncode == 3
    assert code in ran.stderr
    assert str(tmp_path / "home") not in ran.stderr
    assert not (tmp_path / "out").exists()


def test_after_a_fault_the_same_command_goes_on_with_the_shards_that_are_done(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [Fault(r"GET .*/resolve/.*00003-of", "404", 99, skip=1)]
    assert run("reshard", MODEL, tmp_path / "out", "-j", "1").returncode == 3
    hub_mirror.forget()
    hub.faults.clear()
    ran = run("reshard", MODEL, tmp_path / "out", "-j", "1")
    assert ran.returncode == 0, ran.stderr
    assert "written by an earlier run" in ran.stderr


def test_without_a_network_the_refusal_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("inspect", MODEL, HF_HUB_OFFLINE="1")
    assert ran.returncode == 3
    assert "hub-not-cached" in ran.stderr
    assert hub.log == []


def test_a_model_that_the_hub_does_not_have_is_told_in_our_words(hub: FakeHub) -> None:
    ran = run("inspect", "org/modle")
    assert ran.returncode == 3
    assert "no such model" in ran.stderr


@pytest.mark.parametrize("text", ["hf://", "hf://model", "hf://a/b//c", "hf://org/model@", "hf://../x"])
def test_a_url_that_names_no_repository_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="names no repository"):
        hub_name(text)


def test_a_hub_that_lists_a_way_out_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(MODEL, {"../../evil": b"x"})
    ran = run("inspect", MODEL)
    assert ran.returncode == 3
    assert "hub-listing" in ran.stderr
    assert not list(tmp_path.rglob("evil"))


# Downloads


def corrupted(hub: FakeHub, count: int) -> None:
    hub.faults = [Fault(r"GET .*/resolve/.*safetensors", "corrupt", count)]


def test_a_download_that_came_broken_is_fetched_again(hub: FakeHub, local: Path) -> None:
    corrupted(hub, 1)
    folder = hub_download.download(MODEL, None, None, ["*.safetensors", "*.json"])
    assert {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} == {
        p.name: p.read_bytes() for p in (local / "model").glob("*.safetensors")
    }


def test_a_download_that_is_broken_twice_is_refused_and_not_kept(hub: FakeHub, local: Path) -> None:
    corrupted(hub, 999)
    with pytest.raises(Refused) as caught:
        hub_download.download(MODEL, None, None, ["*.safetensors", "*.json"])
    assert caught.value.code == "download-corrupt"
    hub.faults.clear()
    folder = hub_download.download(MODEL, None, None, ["*.safetensors", "*.json"])
    assert all((local / "model" / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())


# Files that are here in part


def made(tmp_path: Path, content: bytes, log: list[tuple[int, int]]) -> sparse.SparseFile:
    def fetch(start: int, stop: int) -> bytes:
        log.append((start, stop))
        return content[start:stop]

    origin = Origin("a/b", "0" * 40, "x", hashlib.sha256(content).hexdigest(), "1" * 40)
    file = sparse.SparseFile(tmp_path / "x", len(content), fetch, origin, is_whole=False)
    sparse.add(file)
    return file


@pytest.fixture
def clean() -> Iterator[None]:
    yield
    sparse.forget_all()


@pytest.mark.usefixtures("clean")
def test_reads_from_several_threads_never_see_a_hole_and_little_is_kept(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(12_000_000)
    file = made(tmp_path, content, [])
    wrong: list[Any] = []
    most = 0

    def read(seed: int) -> None:
        nonlocal most
        chance = random.Random(seed)
        with file.path.open("rb") as opened:
            for _ in range(150):
                start = chance.randrange(len(content))
                length = min(chance.choice([1, 500, 70_000, 300_000]), len(content) - start)
                if read_exact(opened.fileno(), start, length, file="x") != content[start : start + length]:
                    wrong.append((start, length))
                most = max(most, file.path.stat().st_blocks * 512)

    with sparse.reading_through(2_000_000):
        threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert 500_000 < most < 1_048_576 + 4 * 500_000


@pytest.mark.usefixtures("clean")
def test_a_file_that_is_read_in_order_is_hashed_and_one_that_is_not_is_not(tmp_path: Path) -> None:
    log: list[tuple[int, int]] = []
    content = random.Random(1).randbytes(3_000_000)
    file = made(tmp_path, content, log)
    with file.path.open("rb") as opened, sparse.reading_through(1 << 20):
        read_exact(opened.fileno(), 2_000_000, 1_000_000, file="x")
        assert [file.is_checked] == [None]
        read_exact(opened.fileno(), 0, 3_000_000, file="x")
    assert [file.is_checked] == [True]
    assert max(stop - start for start, stop in log) <= 1 << 18


@pytest.mark.usefixtures("clean")
def test_the_identity_of_such_a_file_is_its_content_s(tmp_path: Path) -> None:
    from converter.core.files.opening import identity

    file = made(tmp_path, b"x" * 100_000, [])
    before = identity(file.path)
    with file.held(0, 100_000):
        pass
    assert identity(file.path) == before
    assert before.mtime_ns == 0


def test_diff_of_a_folder_and_its_copy_on_the_hub_brings_headers_only(hub: FakeHub, local: Path) -> None:
    ran = run("diff", local / "model", MODEL)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert hub.sent_bytes < size(local / "model") / 10 + 600_000
    shard = next(n for n in sorted(p.name for p in (local / "model").glob("*.safetensors")))
    content = bytearray((local / "model" / shard).read_bytes())
    content[-1] ^= 1
    hub.add(MODEL, {shard: bytes(content)})
    hub_mirror.forget()
    assert run("diff", local / "model", MODEL).returncode == 1
