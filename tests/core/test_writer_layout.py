"""Which tensor goes into which file, and what the files look like."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.writer.plan import Plan
from converter.errors import Refused
from small_models import (
    contents,
    data_of,
    header_of,
    load,
    metadata_of,
    numbers,
    open_model,
    plan_of,
    same,
    save_model,
    written,
)

FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three files of 4, 8 and 2 kB."""
    return save_model(
        tmp_path / "model",
        {"z.first": numbers(10, 50), "a.second": numbers(10, 50, seed=1)},
        {"b.third": numbers(40, 50, seed=2)},
        {"c.fourth": numbers(500, seed=3, dtype=torch.bfloat16), "d.fifth": torch.arange(250, dtype=torch.int32)},
    )


def test_preserve_keeps_each_tensor_in_its_file_and_order(model: Path, tmp_path: Path) -> None:
    written(plan_of(open_model(model)), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)
    assert same(load(tmp_path / "out"), load(model))


def test_the_data_of_an_unchanged_file_is_copied_byte_by_byte(model: Path, tmp_path: Path) -> None:
    written(plan_of(open_model(model)), tmp_path / "out")
    for name in (FIRST, SECOND, THIRD):
        assert data_of(tmp_path / "out" / name) == data_of(model / name)


def test_an_emptied_file_vanishes_and_the_others_are_numbered_anew(model: Path, tmp_path: Path) -> None:
    checkpoint = open_model(model)
    kept = {n: t for n, t in checkpoint.tensors.items() if n != "b.third"}
    written(plan_of(checkpoint.replace(tensors=kept, dropped={"b.third": "a test"})), tmp_path / "out")
    before = contents(model)
    assert contents(tmp_path / "out") == {
        "model-00001-of-00002.safetensors": before[FIRST],
        "model-00002-of-00002.safetensors": before[THIRD],
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {n: f for f, names in contents(tmp_path / "out").items() for n in names}


def test_the_only_file_left_has_the_plain_name_and_no_index(model: Path, tmp_path: Path) -> None:
    checkpoint = open_model(model)
    only = {"b.third": checkpoint.tensors["b.third"]}
    written(plan_of(checkpoint.replace(tensors=only)), tmp_path / "out")
    assert contents(tmp_path / "out") == {"model.safetensors": ["b.third"]}
    assert not list((tmp_path / "out").glob("*.index.json"))


def added(model: Path, **layout: int) -> Plan:
    """A plan with a new tensor of 400 bytes."""
    checkpoint = open_model(model)
    new = tensors.reshape(checkpoint.tensors["a.second"], (500,))
    return plan_of(checkpoint.replace(tensors={**checkpoint.tensors, "new": tensors.rows(new, 0, 100)}), **layout)


def test_an_added_tensor_joins_the_last_file(model: Path, tmp_path: Path) -> None:
    written(added(model), tmp_path / "out")
    assert contents(tmp_path / "out")[THIRD] == [*contents(model)[THIRD], "new"]
    assert torch.equal(load(tmp_path / "out")["new"], load(model)["a.second"].flatten()[:100])


def test_an_added_tensor_that_the_last_file_has_no_room_for_gets_a_file_of_its_own(model: Path, tmp_path: Path) -> None:
    written(added(model, layout="preserve", max_shard_size=2_300), tmp_path / "out")
    assert list(contents(tmp_path / "out").values()) == [*contents(model).values(), ["new"]]


def test_pack_fills_files_up_to_the_size_and_a_larger_tensor_has_one_alone(model: Path, tmp_path: Path) -> None:
    written(plan_of(open_model(model), max_shard_size=4_100), tmp_path / "out")
    assert list(contents(tmp_path / "out").values()) == [
        ["a.second", "z.first"], ["b.third"], contents(model)[THIRD],
    ]  # fmt: skip
    assert same(load(tmp_path / "out"), load(model))


def test_pack_without_a_size_makes_one_file_of_a_small_model(model: Path, tmp_path: Path) -> None:
    written(plan_of(open_model(model), layout="pack"), tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["model.safetensors"]
    assert same(load(tmp_path / "out"), load(model))


def test_a_checkpoint_without_tensors_is_refused(model: Path) -> None:
    with pytest.raises(Refused) as caught:
        plan_of(open_model(model).replace(tensors={}))
    assert caught.value.code == "no-tensors"


def test_the_index_counts_bytes_and_names_every_tensor(model: Path, tmp_path: Path) -> None:
    written(plan_of(open_model(model)), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 + 2000 + 8000 + 1000 + 1000
    assert index["weight_map"] == {n: f for f, names in contents(model).items() for n in names}


def test_headers_are_canonical(model: Path, tmp_path: Path) -> None:
    written(plan_of(open_model(model)), tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert (8 + length) % 8 == 0
        assert raw[8 : 8 + length].rstrip(b" ") == json.dumps(header_of(file), separators=(",", ":")).encode()
        assert metadata_of(file) == {"format": "pt"}


def test_the_largest_copied_run_keeps_its_place_in_its_block_so_that_it_can_be_cloned(model: Path) -> None:
    checkpoint = open_model(model).rename({"z.first": "a.much.longer.name", "c.fourth": "c"})
    for shard in plan_of(checkpoint).shards:
        largest = max(shard.entries, key=lambda e: e.length)
        assert largest.runs is not None
        assert (largest.offset - largest.runs[0].offset) % 4096 == 0


def test_an_unchanged_config_is_written_as_it_was(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"a": numbers(3)})
    odd = b'{\n\t"model_type" : "llama" }'
    (model / "config.json").write_bytes(odd)
    written(plan_of(open_model(model)), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == odd


def test_side_files_in_folders_are_copied_into_them(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"a": numbers(3)})
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    written(plan_of(open_model(model)), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tool }}"


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.value)
def test_every_dtype_is_copied_byte_by_byte_also_0_d_and_empty(dtype: DType, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {"a": numbers(3)})
    scalar = () if dtype.bits % 8 == 0 else (8,)
    shapes = {"grid": (8, 16), "scalar": scalar, "empty": (0, 7)}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = TensorInfo(dtype, shape).nbytes
        header[name] = {"dtype": dtype.value, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    data = bytes(i * 37 % 256 for i in range(at))
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    plan = plan_of(open_model(model))
    assert plan.counts == {"copied": 3, "computed": 0, "filled": 0, "dropped": 0}
    written(plan, tmp_path / "out")
    assert data_of(tmp_path / "out" / "model.safetensors") == data
    found = header_of(tmp_path / "out" / "model.safetensors")
    assert {n: (found[n]["dtype"], tuple(found[n]["shape"])) for n in shapes} == {
        n: (dtype.value, shape) for n, shape in shapes.items()
    }


def test_a_plan_survives_json(model: Path) -> None:
    plan = added(model)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
