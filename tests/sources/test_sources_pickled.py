"""Models and adapters in `.bin` form: read without unpickling, and written as what safetensors would have been."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from converter.errors import ConvertError
from converter.sources.hf import peft
from converter.sources.hf import source as hf
from oracle.command import run


def as_pickle(folder: Path, target: Path, *, shards: int = 1, **options: Any) -> Path:
    """The same model with its tensors in pytorch_model.bin, or in several files with an index."""
    shutil.copytree(folder, target)
    tensors = oracle.read_tensors(folder)
    for path in target.glob("*.safetensors*"):
        path.unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin", **options)
        return target
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = names[number::shards]
        torch.save({n: tensors[n] for n in part}, target / file, **options)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize(
    "options",
    [{}, {"shards": 3}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}],
    ids=["zip", "sharded", "legacy", "protocol-4"],
)
def test_reshard_writes_a_pickled_model_as_safetensors_bit_by_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    base = oracle.make_base(tmp_path / "base")
    pickled = as_pickle(base.path, tmp_path / "pickled", **options)
    ran = run("reshard", pickled, tmp_path / "out")
    assert ran.code == 0, ran.err
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(base.path))


def test_adapter_and_base_in_pickled_form_merge_like_those_in_safetensors(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    pickled = tmp_path / "pickled-adapter"
    shutil.copytree(adapter, pickled)
    torch.save(oracle.adapters.adapter_tensors(adapter), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert run("merge-lora", adapter, tmp_path / "one", "--base", base.path).code == 0
    ran = run("merge-lora", pickled, tmp_path / "two", "--base", as_pickle(base.path, tmp_path / "pickled"))
    assert ran.code == 0, ran.err
    oracle.same_bits(oracle.read_tensors(tmp_path / "two"), oracle.read_tensors(tmp_path / "one"))


def test_tied_tensors_that_share_memory_are_written_once(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", tied=True)
    pickled = tmp_path / "pickled"
    shutil.copytree(base.path, pickled)
    tensors = oracle.read_tensors(base.path)
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, pickled / "pytorch_model.bin")
    ran = run("reshard", pickled, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert set(oracle.read_tensors(tmp_path / "out")) == set(oracle.read_tensors(base.path))
    assert "lm_head.weight" in ran.text


def test_the_whole_pickle_beside_an_empty_safetensors_is_used_and_said(tmp_path: Path) -> None:
    """OpenRLHF up to 0.5.5 leaves the two side by side under ZeRO-3."""
    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    assert run("merge-lora", adapter, tmp_path / "one", "--base", base.path).code == 0
    whole = oracle.adapters.adapter_tensors(adapter)
    torch.save(whole, adapter / "adapter_model.bin")
    from safetensors.torch import save_file

    save_file({n: torch.empty(0) for n in whole}, adapter / "adapter_model.safetensors")
    ran = run("merge-lora", adapter, tmp_path / "two", "--base", base.path)
    assert ran.code == 0, ran.err
    oracle.same_bits(oracle.read_tensors(tmp_path / "two"), oracle.read_tensors(tmp_path / "one"))
    shown = run("inspect", adapter)
    assert "adapter_model.bin" in shown.text


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    folder = tmp_path / "hostile"
    folder.mkdir()
    name = "pytorch_model.bin" if kind == "model" else "adapter_model.bin"
    torch.save({"w": torch.ones(2), "x": _Payload(canary)}, folder / name)
    config = {"peft_type": "LORA", "r": 4} if kind == "adapter" else {"model_type": "llama"}
    (folder / ("adapter_config.json" if kind == "adapter" else "config.json")).write_text(json.dumps(config))
    source = peft.SOURCE if kind == "adapter" else hf.SOURCE
    with pytest.raises(ConvertError) as refused:
        source.open(folder, asked="hostile")
    assert refused.value.code == "pickle-names"
    assert "system" in str(refused.value)
    assert name in str(refused.value)
    assert not canary.exists()


def test_bit_rot_in_a_pickled_weight_file_is_found_before_anything_is_published(tmp_path: Path) -> None:
    """The zip container records a CRC-32 of every storage; torch itself does not look at it."""
    base = oracle.make_base(tmp_path / "base")
    pickled = as_pickle(base.path, tmp_path / "pickled") / "pytorch_model.bin"
    with zipfile.ZipFile(pickled) as archive:
        largest = max(archive.infolist(), key=lambda i: i.file_size)
    raw = bytearray(pickled.read_bytes())
    raw[largest.header_offset + largest.file_size // 2] ^= 1
    pickled.write_bytes(raw)
    ran = run("reshard", pickled.parent, tmp_path / "out")
    assert ran.code in (3, 4)
    assert "pytorch_model.bin" in ran.text
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_holds_no_weights_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"step": 3, "w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvertError) as refused:
        hf.SOURCE.open(tmp_path, asked="x")
    assert refused.value.code == "pickled-not-weights"
