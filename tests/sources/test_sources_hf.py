"""Hugging Face folders: what is read, what is refused, and that every refusal names its file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oracle
from converter.core.checkpoint import Checkpoint
from converter.core.files.opening import identity
from converter.core.formats.safetensors_io import build_header
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Stored
from converter.errors import ConvertError
from converter.sources.hf import peft
from converter.sources.hf import source as hf
from converter.sources.survey import Survey

COMMIT = "0123456789abcdef0123456789abcdef01234567"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shard(path: Path, *names: str, shape: tuple[int, ...] = (2, 3), **metadata: str) -> None:
    """A safetensors file whose data bytes count up."""
    info = TensorInfo(DType.F32, shape)
    data = bytes(n % 256 for n in range(info.nbytes * len(names)))
    path.write_bytes(build_header([(n, info) for n in names], metadata) + data)


def write_index(folder: Path, weight_map: dict[str, str], total_size: Any = 96) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama",\n "note": "kept verbatim"}')
    shard(folder / "model.safetensors", "b", "a")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    shard(folder / A, "d", "c")
    shard(folder / B, "a", "b")
    write_index(folder, {"a": B, "b": B, "c": A, "d": A})
    return folder


def opened(folder: Path, **options: Any) -> Checkpoint:
    return hf.SOURCE.open(folder, asked=str(folder), **options)


def faults(folder: Path) -> dict[str, str]:
    found: Survey = hf.SOURCE.survey(folder)
    return {f.code: f.severity for f in found.faults}


# What a checkpoint says


def test_a_single_file_is_read_by_its_header(single: Path) -> None:
    checkpoint = opened(single)
    assert list(checkpoint.tensors) == ["b", "a"]
    tensor = checkpoint.tensors["a"]
    assert isinstance(tensor, Stored)
    assert (tensor.info, tensor.file) == (TensorInfo(DType.F32, (2, 3)), str(single / "model.safetensors"))
    raw = (single / "model.safetensors").read_bytes()
    assert raw[tensor.offset : tensor.offset + 24] == bytes(range(24, 48))
    assert faults(single) == {}


def test_tensors_come_in_shard_order_then_offset_order(sharded: Path) -> None:
    checkpoint = opened(sharded)
    assert list(checkpoint.tensors) == ["d", "c", "a", "b"]
    assert checkpoint.shards == {"d": A, "c": A, "a": B, "b": B}
    assert faults(sharded) == {}


def test_shards_are_ordered_by_number_also_where_numbers_have_no_zeros(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = [f"part-{n}.safetensors" for n in (1, 2, 9, 10, 11)]
    for n, file in enumerate(files):
        shard(tmp_path / file, f"t{n}")
    write_index(tmp_path, {f"t{n}": file for n, file in reversed(list(enumerate(files)))}, 120)
    assert list(opened(tmp_path).tensors) == ["t0", "t1", "t2", "t3", "t4"]


def test_config_is_kept_as_bytes_and_as_a_value(single: Path) -> None:
    checkpoint = opened(single)
    assert checkpoint.config_bytes == (single / "config.json").read_bytes()
    assert checkpoint.config == {"model_type": "llama", "note": "kept verbatim"}


def test_every_file_that_was_read_is_among_the_inputs(sharded: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    names = ("config.json", INDEX, A, B, "tokenizer.json")
    assert opened(sharded).inputs == {str(sharded / n): identity(sharded / n) for n in names}


def test_origin_names_the_folder_and_not_its_path(single: Path) -> None:
    origin = hf.SOURCE.open(single, asked="./single").origin
    assert (origin.kind, origin.asked, origin.name, origin.revision) == ("model", "./single", "single", None)
    assert (origin.path, origin.stored_format) == (str(single), "safetensors")


def test_origin_of_a_link_is_what_it_leads_to(single: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("single")
    checkpoint = opened(tmp_path / "latest")
    assert (checkpoint.origin.name, checkpoint.origin.path) == ("single", str(single))
    assert str(single / "model.safetensors") in checkpoint.inputs


def test_header_digest_tells_headers_apart_and_nothing_else(single: Path) -> None:
    first = opened(single).origin.header_digest
    raw = bytearray((single / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (single / "model.safetensors").write_bytes(raw)
    assert opened(single).origin.header_digest == first
    shard(single / "model.safetensors", "b", "A")
    assert opened(single).origin.header_digest != first


def test_metadata_is_what_all_shards_agree_on(sharded: Path) -> None:
    shard(sharded / A, "d", "c", same="1", differs="2", only="3")
    shard(sharded / B, "a", "b", same="1", differs="4")
    assert opened(sharded).metadata == {"format": "pt", "same": "1"}


def test_infinity_in_a_config_is_no_obstacle(single: Path) -> None:
    (single / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert opened(single).config == {"time_step_limit": [0.0, float("inf")]}


def test_opening_changes_nothing_on_disk(sharded: Path) -> None:
    before = oracle.listing(sharded)
    opened(sharded)
    hf.SOURCE.survey(sharded)
    assert oracle.listing(sharded) == before


def test_transformers_own_folders_are_read_whole(tmp_path: Path) -> None:
    import torch

    for number, kind in enumerate(({}, {"sharded": True}, {"dtype": "bfloat16", "tied": True})):
        folder = tmp_path / str(number)
        oracle.make_base(folder, **kind)
        checkpoint, expected = opened(folder), oracle.read_tensors(folder)
        assert set(checkpoint.tensors) == set(expected)
        assert faults(folder) == {}
        for name, tensor in checkpoint.tensors.items():
            assert isinstance(tensor, Stored)
            raw = Path(tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.info.nbytes]
            assert raw == bytes(expected[name].contiguous().view(-1).view(torch.uint8).tolist())


# The Hub's cache


def test_a_snapshot_is_named_by_its_repository_and_commit(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, file in enumerate(sorted(single.iterdir())):
        file.rename(repository / "blobs" / f"etag{n}")
        (snapshot / file.name).symlink_to(f"../../blobs/etag{n}")
    checkpoint = hf.SOURCE.open(snapshot, asked="Qwen/Qwen2.5-7B")
    assert (checkpoint.origin.name, checkpoint.origin.revision) == ("Qwen/Qwen2.5-7B", COMMIT)
    assert str(snapshot / "model.safetensors") in checkpoint.inputs


def test_a_shard_that_links_out_of_its_folder_is_refused(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (single / "model.safetensors").symlink_to("../elsewhere.safetensors")
    assert faults(single) == {"input-outside": "error"}


# What is refused. Each case breaks a sound folder of two shards; the message must have the words.


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _map(**weight_map: str) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, weight_map)


def _cut(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count]) and None


def _both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def _pickled(folder: Path) -> None:
    for name in (A, B, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def _named_pickle(folder: Path) -> None:
    (folder / B).write_bytes(b"PK\x03\x04" + bytes(100))


REFUSED: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "config-missing": (_drop("config.json"), "config-missing", ("config.json",)),
    "config-empty": (_text("config.json", " "), "json-malformed", ("config.json",)),
    "config-cut": (_text("config.json", '{"model_type": '), "json-malformed", ("config.json",)),
    "config-is-a-list": (_text("config.json", "[1]"), "json-malformed", ("config.json", "no JSON object")),
    "config-key-twice": (
        _text("config.json", '{"a": 1, "a": 2}'),
        "json-malformed",
        ("config.json", "`a` appears twice"),
    ),
    "config-names-other-weights": (
        _text("config.json", '{"transformers_weights": "other.safetensors"}'),
        "weights-elsewhere",
        ("other.safetensors",),
    ),
    "shard-missing": (_drop(B), "shard-missing", ("1 of 2 shards", B, "2 tensors")),
    "shard-cut": (_cut(B, 1), "file-truncated", (B, "cut short")),
    "shard-cut-in-header": (_cut(B, 150), "file-truncated", (B, "cut short")),
    "shard-is-a-pickle": (_named_pickle, "safetensors-not", (B, "pickled")),
    "shard-is-a-folder": (_both(_drop(B), lambda f: (f / B).mkdir()), "shard-missing", ("1 of 2 shards",)),
    "index-cut": (_cut(INDEX, 3), "index-malformed", (INDEX,)),
    "index-climbs": (_map(a="../model.safetensors"), "index-malformed", (INDEX, "../model.safetensors")),
    "index-of-pickles": (_map(a="pytorch_model.bin"), "index-malformed", (INDEX, "pytorch_model.bin")),
    "index-phantom": (_map(a=B, b=B, c=A, d=A, ghost=B), "index-phantom", (INDEX, "ghost", B)),
    "index-conflict": (_map(a=A, b=B, c=A, d=A), "index-conflict", (INDEX, f"a is in {B}, not in {A}")),
    "index-swapped": (_map(a=A, b=A, c=B, d=B), "index-conflict", (INDEX, "4 tensors")),
    "tensor-in-two-shards": (lambda f: shard(f / B, "a", "b", "c"), "tensor-twice", (A, B, "c is in")),
    "no-index-and-a-shard-missing": (
        _both(_drop(INDEX), _drop(A)),
        "shard-missing",
        (INDEX, "1 of 2 shards are missing", A),
    ),
    "no-index-and-two-sets": (
        _both(_drop(INDEX), lambda f: shard(f / "model-00001-of-00003.safetensors", "x")),
        "shard-missing",
        ("different",),
    ),
    "no-index-and-a-huge-count": (
        _both(_drop(INDEX), _drop(A), lambda f: (f / B).rename(f / "model-00001-of-999999.safetensors") and None),
        "shard-missing",
        ("999998 of 999999",),
    ),
    "pickled-and-cut": (_pickled, "file-truncated", ("pytorch_model.bin", "cut short")),
    "no-weights": (_both(_drop(A), _drop(B), _drop(INDEX)), "weights-missing", ("model.safetensors",)),
    "no-tensors": (_both(_drop(INDEX), lambda f: shard(f / "model.safetensors")), "no-tensors", ("no tensor",)),
    "zero-3": (lambda f: shard(f / B, "a", "b", shape=(0,)), "zero3-empty-tensors", ("ZeRO-3", "2 of 4", "a, b")),
    "tokenizer-links-out": (
        lambda f: (f / "tokenizer.json").symlink_to("/etc/passwd"),
        "input-outside",
        ("tokenizer.json",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_folder_is_refused_by_name_and_surveyed_without_an_exception(name: str, sharded: Path) -> None:
    change, code, words = REFUSED[name]
    change(sharded)
    hf.SOURCE.survey(sharded)
    with pytest.raises(ConvertError) as caught:
        opened(sharded)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    for word in words:
        assert word in str(caught.value)


def test_all_faults_are_counted_and_the_first_is_told(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    (sharded / A).unlink()
    with pytest.raises(ConvertError, match="and 1 more fault;"):
        opened(sharded)
    assert faults(sharded) == {"config-missing": "error", "shard-missing": "error"}


# What is accepted with a remark


COSMETIC: dict[str, tuple[Callable[[Path], None], str]] = {
    "tensor-not-in-index": (_map(a=B, c=A, d=A), "index-unlisted"),
    "total-size-wrong": (lambda f: write_index(f, {"a": B, "b": B, "c": A, "d": A}, 24), "index-total-size"),
    "total-size-text": (lambda f: write_index(f, {"a": B, "b": B, "c": A, "d": A}, "96"), "index-total-size"),
    "index-missing": (_drop(INDEX), "index-missing"),
    "stray-shard": (lambda f: shard(f / "model-00003-of-00003.safetensors", "old"), "stray-weights"),
    "layer-of-another-kind": (lambda f: (f / "regression_layer.pt").write_bytes(b"?"), "stray-weights"),
    "unfinished-download": (lambda f: (f / "model.safetensors.incomplete").touch(), "download-unfinished"),
    "adapter-config": (_text("adapter_config.json", "{}"), "adapter-config-stray"),
}


@pytest.mark.parametrize("name", COSMETIC)
def test_blemish_is_a_cosmetic_fault_and_no_obstacle(name: str, sharded: Path) -> None:
    change, code = COSMETIC[name]
    change(sharded)
    assert faults(sharded) == {code: "cosmetic"}
    assert set(opened(sharded).tensors) == set("abcd")


def test_a_total_size_that_is_absent_or_right_is_no_fault(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": B, "b": B, "c": A, "d": A}}))
    assert faults(sharded) == {}


def test_of_a_single_file_and_shards_the_single_file_is_read_as_transformers_does(sharded: Path) -> None:
    shard(sharded / "model.safetensors", "newer")
    assert list(opened(sharded).tensors) == ["newer"]
    assert faults(sharded)["stale-shards"] == "cosmetic"


def test_unfinished_download_in_the_cache_is_told(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc.incomplete").touch()
    (repository / "snapshots").mkdir()
    single.rename(repository / "snapshots" / COMMIT)
    assert faults(repository / "snapshots" / COMMIT) == {"download-unfinished": "cosmetic"}


def test_a_zero_size_tensor_that_is_no_zero3_leftover_is_kept(single: Path) -> None:
    shard(single / "model.safetensors", "a", shape=(0, 4096))
    assert opened(single).tensors["a"].info.shape == (0, 4096)


def test_folder_that_can_not_be_listed_is_surveyed_all_the_same(tmp_path: Path) -> None:
    assert hf.SOURCE.survey(tmp_path / "nothing").error() is not None


# Detection


def _with(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("config.json", "model.safetensors"), "model"),
        (("model.safetensors",), "model"),
        ((INDEX,), "model"),
        ((A,), "model"),
        (("config.json", "pytorch_model.bin"), "model"),
        (("config.json", "pytorch_model-00001-of-00002.bin"), "model"),
        (("config.json",), "model"),
        (("config.json", "tokenizer.json", "optimizer.pt"), "model"),
        (("adapter_config.json", "adapter_model.safetensors"), "adapter"),
        (("adapter_config.json", "adapter_model.bin"), "adapter"),
        (("adapter_model.safetensors",), "adapter"),
        (("adapter_config.json",), "adapter"),
        (("config.json", "adapter_config.json", "adapter_model.safetensors"), "adapter"),
        (("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"), "adapter"),
        (("config.json", "model.safetensors", "adapter_config.json"), "model"),
        (("config.json", "model.safetensors", "adapter_model.safetensors"), "model"),
        (("config.json", "checkpoint-10/model.safetensors"), None),
        (("checkpoint-10/adapter_config.json",), None),
        (("tokenizer.json", "notes.txt"), None),
        (("other.safetensors",), None),
        ((), None),
    ],
)
def test_each_folder_is_of_one_kind(tmp_path: Path, names: tuple[str, ...], kind: str | None) -> None:
    folder = _with(tmp_path / "folder", *names)
    found = [k for k, source in (("model", hf.SOURCE), ("adapter", peft.SOURCE)) if source.detect(folder)]
    assert found == ([kind] if kind else [])
