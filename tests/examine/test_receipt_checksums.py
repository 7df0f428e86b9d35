"""The receipt records checksums of what was written, and `verify` finds any byte that was flipped since."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converter.cli import main
from converter.core.files.checksums import joined
from converter.shipped import shipped
from small_models import half_cast, written
from verify_folders import codes, make_rm, text_of, verify

BASE, ADAPTER = shipped("fixtures") / "tiny-qwen2-base", shipped("fixtures") / "tiny-reward-adapter"
MADE = {
    "convert": ["convert", "{rm}", "{out}", "--to", "verl", "--role", "critic"],
    "reshard": ["reshard", "{rm}", "{out}", "--max-shard-size", "30KB"],
    "reshard in bf16": ["reshard", "{rm}", "{out}", "--dtype", "bf16"],
    "merge-lora": ["merge-lora", str(ADAPTER), "{out}", "--base", str(BASE)],
    "merge-lora in shards": ["merge-lora", str(ADAPTER), "{out}", "--base", str(BASE), "--max-shard-size", "300KB"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each command wrote, by its name."""
    root = tmp_path_factory.mktemp("made")
    rm = make_rm(root / "rm")
    for name, words in MADE.items():
        assert main([w.format(rm=rm, out=root / name) for w in words] + ["-q"]) == 0
    return root


def flip(file: Path, at: int, bit: int = 0) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        value = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([value ^ 1 << bit]))


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_two_stretches_join_as_zlib_computes_them_in_one(first: bytes, second: bytes) -> None:
    assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_checksums_join_over_gigabytes() -> None:
    zeros = bytes(1 << 20)
    crc = 0
    for _ in range(64):
        crc = zlib.crc32(zeros, crc)
    assert joined(zlib.crc32(b"head"), crc, 64 << 20) == zlib.crc32(bytes(64 << 20), zlib.crc32(b"head"))


@pytest.mark.parametrize("name", MADE)
def test_the_receipt_has_the_checksum_of_every_file_and_tensor(name: str, made: Path) -> None:
    receipt = json.loads((made / name / "rlhf-convert.json").read_text())
    files = sorted((made / name).glob("*.safetensors"))
    assert sorted(receipt["files"]) == [f.name for f in files]
    for file in files:
        recorded = receipt["files"][file.name]
        assert recorded["size"] == file.stat().st_size
        assert recorded["crc32"] == f"{zlib.crc32(file.read_bytes()):08x}"
        values = {n: t.contiguous().view(torch.uint8).numpy() for n, t in load_file(file).items()}
        assert recorded["tensors"] == {n: f"{zlib.crc32(v.tobytes()):08x}" for n, v in values.items()}


@pytest.mark.parametrize("name", MADE)
def test_what_was_written_verifies_and_with_any_byte_flipped_fails(
    name: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made / name
    code, found = verify(capsys, str(folder))
    assert code == 0, found
    assert [c["outcome"] for c in found["checks"] if c["label"] == "bytes"] == ["holds"]
    draw = random.Random(name)
    for file in sorted(folder.glob("*.safetensors"))[:2]:
        names = set(load_file(file))
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        for at in [draw.randrange(header, file.stat().st_size) for _ in range(6)] + [draw.randrange(8, header)]:
            bit = draw.randrange(7)
            flip(file, at, bit)
            code, found = verify(capsys, str(folder))
            assert code == 4, (file, at)
            if at >= header:
                assert any(n in text_of(found, "values-changed") for n in names)
            flip(file, at, bit)
    assert verify(capsys, str(folder))[0] == 0


def test_a_type_renamed_in_the_header_is_found_though_no_value_changed(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = made / "convert" / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    try:
        code, found = verify(capsys, str(made / "convert"))
        assert code == 4
        assert "values-changed" in codes(found)
    finally:
        file.write_bytes(before)


def test_tensors_that_another_program_put_into_other_files_are_compared_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rm, out = make_rm(tmp_path / "rm"), tmp_path / "out"
    assert main(["reshard", str(rm), str(out), "--max-shard-size", "30KB", "-q"]) == 0
    tensors = {n: t for f in sorted(out.glob("model-*")) for n, t in load_file(f).items()}
    for file in out.glob("model*"):
        file.unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    code, found = verify(capsys, str(out))
    assert code == 0, found
    assert "files-renamed" in codes(found, "note")
    name = max(tensors)
    save_file(tensors | {name: tensors[name] + 1}, out / "model.safetensors", metadata={"format": "pt"})
    code, found = verify(capsys, str(out))
    assert code == 4
    assert name in text_of(found, "values-changed")


def test_checksums_are_those_of_one_run_whatever_the_workers_and_interruptions(tmp_path: Path) -> None:
    plan = half_cast(tmp_path)
    one, many = written(plan, tmp_path / "one", jobs=1), written(plan, tmp_path / "many", jobs=4)
    assert one.content == many.content
    assert one.content["files"]


def test_a_torch_file_is_recorded_and_a_flipped_byte_in_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rm, out = make_rm(tmp_path / "rm"), tmp_path / "out"
    assert main(["convert", str(rm), str(out), "--to", "deepspeed-chat", "--role", "reward", "-q"]) == 0
    receipt = json.loads((out / "rlhf-convert.json").read_text())
    (file,) = out.glob("*.bin")
    assert receipt["files"][file.name]["crc32"] == f"{zlib.crc32(file.read_bytes()):08x}"
    assert verify(capsys, str(out), "--for", "deepspeed-chat")[0] == 0
    flip(file, file.stat().st_size // 2)
    assert verify(capsys, str(out), "--for", "deepspeed-chat")[0] == 4
