"""Outputs of other kinds: torch's zip format, heads in files of their own, weights in a folder, all in one file."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from converter.core.checkpoint import Checkpoint
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.writer.accounting import unaccounted
from converter.core.writer.plan import Plan
from converter.errors import Refused, VerificationFailed
from durability import FIXTURES, Quiet, tree
from places import SUPPORT
from small_models import Tensors, load, numbers, open_model, plan_of, same, save_model, written

# Through the writer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(
        tmp_path / "model",
        {"w": numbers(300, 700), "copied": numbers(700, 50).bfloat16()},
        {"norm": numbers(7, seed=3), "scalar": torch.tensor(3), "nothing": torch.zeros(0, 4)},
    )


def as_torch(model: Path, **changes: Any) -> Checkpoint:
    """The model with `w` cast to bf16, in torch files."""
    given = open_model(model)
    cast = {n: tensors.cast(t, DType.BF16) if n == "w" else t for n, t in given.tensors.items()}
    return given.replace(**{"tensors": cast, "container": "torch"} | changes)


def torch_plan(model: Path, *, max_shard_size: int | None = None, **changes: Any) -> Plan:
    return plan_of(as_torch(model, **changes), max_shard_size=max_shard_size, layout="pack")


def expected(model: Path) -> Tensors:
    given = load(model)
    return given | {"w": given["w"].bfloat16()}


def load_torch(folder: Path, **options: Any) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        found |= torch.load(file, weights_only=True, **options)  # noqa: TID251 - the oracle
    return found


@pytest.mark.parametrize("options", [{}, {"mmap": True}], ids=["whole", "mmap"])
def test_torch_loads_what_was_copied_and_what_was_computed(model: Path, tmp_path: Path, options: Any) -> None:
    written(torch_plan(model), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json", "pytorch_model.bin", "rlhf-convert.json", "tokenizer.json",
    ]  # fmt: skip
    assert same(load_torch(tmp_path / "out", **options), expected(model))


def test_torch_loads_it_by_offsets_that_it_computes_itself(model: Path, tmp_path: Path) -> None:
    """torch then trusts that records lie exactly where its own writer puts them."""
    from torch.utils.serialization import config

    written(torch_plan(model), tmp_path / "out")
    with config.patch({"load.calculate_storage_offsets": True}):
        found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True, mmap=True)  # noqa: TID251
    assert same(found, expected(model))


def test_every_checksum_in_the_zip_is_right(model: Path, tmp_path: Path) -> None:
    written(torch_plan(model), tmp_path / "out", jobs=3)
    with zipfile.ZipFile(tmp_path / "out" / "pytorch_model.bin") as archive:
        assert archive.testzip() is None
        assert all(i.CRC for i in archive.infolist() if i.file_size)


def test_shards_have_the_names_and_the_index_that_transformers_gives_them(model: Path, tmp_path: Path) -> None:
    written(torch_plan(model, max_shard_size=420_000), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    assert index["weight_map"] == {"w": first, "copied": second, "norm": second, "scalar": second, "nothing": second}
    assert index["metadata"] == {"total_size": 300 * 700 * 2 + 700 * 50 * 2 + 7 * 4 + 8}
    assert same(load_torch(tmp_path / "out"), expected(model))


def test_the_same_bytes_for_any_number_of_jobs(model: Path, tmp_path: Path) -> None:
    for jobs in (1, 2, 5):
        written(torch_plan(model, max_shard_size=420_000), tmp_path / str(jobs), jobs=jobs)
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "5")


def test_the_plan_survives_json(model: Path) -> None:
    plan = torch_plan(model, beside={"value_head.pt": {"weight": open_model(model).tensors["norm"]}})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.fingerprint == plan.fingerprint


def test_an_adapter_in_torch_files_has_the_name_that_peft_reads(model: Path) -> None:
    given = as_torch(model)
    plan = plan_of(given.replace(origin=dataclasses.replace(given.origin, kind="adapter")))
    assert [s.file for s in plan.shards] == ["adapter_model.bin"]


# Stopped and resumed


def stopped(plan: Plan, out: Path) -> Path:
    """A stage in which every shard is written."""

    def stop(measures: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(plan, out, accept=stop)
    return out.with_name(out.name + ".partial")


def spoilt(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("where", ["computed", "pickle", "descriptor", "directory", "nowhere"])
def test_a_torch_file_is_resumed_only_if_all_of_it_is_there_that_was_journalled(
    model: Path, tmp_path: Path, where: str
) -> None:
    plan = torch_plan(model, max_shard_size=420_000)
    stage = stopped(plan, tmp_path / "out")
    first, second = (f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))
    file = stage / first
    with zipfile.ZipFile(file) as archive:
        info = next(i for i in archive.infolist() if i.file_size == 300 * 700 * 2)
        at = {"pickle": 80, "directory": archive.start_dir + 17, "computed": 0, "descriptor": 0, "nowhere": 0}[where]
    data = next(archive for _, archive, _ in plan.shards[0].archives).tensors[0]
    assert (data.start, data.size) == (info.header_offset, info.file_size)
    at += {"computed": data.offset + 5, "descriptor": data.offset + data.size + 5}.get(where, 0)
    if where != "nowhere":
        spoilt(file, at)
    reporter = Quiet()
    written(plan, tmp_path / "out", reporter=reporter)
    assert reporter.resumed == ([first, second] if where == "nowhere" else [second])
    written(plan, tmp_path / "at-once")
    assert tree(tmp_path / "out") == tree(tmp_path / "at-once")


@pytest.mark.parametrize("at", ["name", "length"])
def test_a_damaged_directory_is_found_before_publication(model: Path, tmp_path: Path, at: str) -> None:
    plan = torch_plan(model)

    def damage(measures: object) -> None:
        file = tmp_path / "out.partial" / "pytorch_model.bin"
        with zipfile.ZipFile(file) as archive:
            start = archive.start_dir
        spoilt(file, start + {"name": 60, "length": 24}[at])

    with pytest.raises(VerificationFailed, match="the zip on disk") as caught:
        written(plan, tmp_path / "out", accept=damage)
    assert caught.value.code == "written-differs"
    assert not (tmp_path / "out").exists()


# Files beside


def test_files_beside_are_written_in_the_container_that_their_suffix_names(model: Path, tmp_path: Path) -> None:
    given = open_model(model)
    head = {
        "v_head.summary.weight": given.tensors["norm"],
        "v_head.summary.bias": tensors.cast(given.tensors["norm"], DType.F16),
    }
    files = {"value_head.safetensors": head, "value_head.bin": head, "value_head.pt": {"weight": given.tensors["norm"]}}
    written(plan_of(given.replace(beside=files)), tmp_path / "out")
    norm = load(model)["norm"]
    wanted = {"v_head.summary.weight": norm, "v_head.summary.bias": norm.half()}
    out = tmp_path / "out"
    assert same(load_file(out / "value_head.safetensors"), wanted)
    assert same(torch.load(out / "value_head.bin", weights_only=True), wanted)  # noqa: TID251 - the oracle
    assert same(torch.load(out / "value_head.pt", weights_only=True), {"weight": norm})  # noqa: TID251 - the oracle
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load(model))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load(model).values())


def test_a_tensor_of_a_file_beside_that_nobody_uses_is_unaccounted(model: Path) -> None:
    given = open_model(model)
    norm = given.tensors["norm"]
    rest = {n: t for n, t in given.tensors.items() if n != "norm"}
    source = given.replace(tensors=rest, beside={"value_head.pt": {"weight": norm}})
    assert unaccounted([source], source) is None
    assert unaccounted([source], source.replace(beside={})) == "value_head.pt:weight"
    assert unaccounted([source], source.replace(beside={}, dropped={"value_head.pt:weight": "asked"})) is None
    assert unaccounted([source], source.replace(beside={}, tensors=rest | {"score.weight": norm})) is None
    assert source.total_bytes == given.total_bytes


# A folder for the weights


def test_weights_and_index_go_to_the_subfolder_and_the_rest_stays(model: Path, tmp_path: Path) -> None:
    head = {"weight": open_model(model).tensors["norm"]}
    plan = torch_plan(model, max_shard_size=420_000, subfolder="modeling", beside={"value_head.pt": head})
    written(plan, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out" / "modeling")) == [
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json",
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json", "modeling", "rlhf-convert.json", "tokenizer.json", "value_head.pt",
    ]  # fmt: skip
    index = json.loads((tmp_path / "out" / "modeling" / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    assert same(load_torch(tmp_path / "out" / "modeling"), expected(model))


def test_a_stopped_run_with_a_subfolder_goes_on_and_throws_strangers_out_of_it(model: Path, tmp_path: Path) -> None:
    plan = torch_plan(model, max_shard_size=420_000, subfolder="modeling")
    stage = stopped(plan, tmp_path / "out")
    spoilt(stage / "modeling" / "pytorch_model-00001-of-00002.bin", 80)
    (stage / "modeling" / "stranger").mkdir()
    (stage / "modeling" / "pytorch_model-00009-of-00009.bin.tmp").touch()
    reporter = Quiet()
    written(plan, tmp_path / "out", reporter=reporter)
    assert reporter.resumed == ["modeling/pytorch_model-00002-of-00002.bin"]
    written(plan, tmp_path / "at-once")
    assert tree(tmp_path / "out") == tree(tmp_path / "at-once")


def test_a_subfolder_that_became_a_link_is_not_written_through(model: Path, tmp_path: Path) -> None:
    plan = torch_plan(model, subfolder="modeling")
    stage = stopped(plan, tmp_path / "out")
    (stage / "modeling").rename(tmp_path / "elsewhere")
    (stage / "modeling").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    reporter = Quiet()
    written(plan, tmp_path / "out", reporter=reporter)
    assert reporter.resumed == []
    assert tree(tmp_path / "elsewhere") == before
    assert not (tmp_path / "out" / "modeling").is_symlink()


def test_an_output_with_a_subfolder_is_replaced_whole(model: Path, tmp_path: Path) -> None:
    written(torch_plan(model, subfolder="modeling"), tmp_path / "out")
    written(torch_plan(model), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "modeling").exists()
    assert same(load_torch(tmp_path / "out"), expected(model))


@pytest.mark.parametrize("folder", ["..", ".", "a/b", "/tmp", "../x", "-x", ".hidden", "config.json", "tokenizer.json"])
def test_a_subfolder_that_leads_elsewhere_or_is_a_file_is_refused(model: Path, folder: str) -> None:
    with pytest.raises(Refused) as caught:
        torch_plan(model, subfolder=folder)
    assert caught.value.code == "file-name"


@pytest.mark.parametrize(
    "file",
    ["../head.pt", "a/head.pt", "/head.pt", ".head.pt", "head.json", "head.pth.py", "pytorch_model.bin", "-h.bin", ""],
)
def test_a_file_beside_that_leads_elsewhere_or_takes_a_name_is_refused(model: Path, file: str) -> None:
    head = {"weight": open_model(model).tensors["norm"]}
    with pytest.raises(Refused) as caught:
        torch_plan(model, beside={file: head})
    assert caught.value.code == "file-name"


# One file


def test_a_loader_that_reads_one_file_gets_one_whatever_the_source_has(model: Path) -> None:
    plan = plan_of(as_torch(model, one_file=True, shards=open_model(model).shards))
    assert [s.file for s in plan.shards] == ["pytorch_model.bin"]
    with pytest.raises(Refused, match="reads one file of weights") as caught:
        plan_of(as_torch(model, one_file=True), max_shard_size=100_000)
    assert caught.value.code == "one-file"


# Memory


@pytest.mark.slow
def test_a_torch_file_of_a_gigabyte_is_written_in_the_memory_that_is_declared(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", {f"w{i}": torch.zeros(8192, 4096) for i in range(8)})
    code = (
        "import sys, resource; sys.path.insert(0, sys.argv[3]); from pathlib import Path; "
        "from small_models import open_model, plan_of, written; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "written(plan_of(open_model(Path(sys.argv[1])).replace(container='torch')), Path(sys.argv[2]), jobs=4); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "out"), str(SUPPORT)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) * 1024 < 50_000_000


# Read by others


@pytest.mark.parametrize("size", [None, 60_000], ids=["one-file", "sharded"])
def test_transformers_loads_torch_files_as_it_loads_the_base(tmp_path: Path, size: int | None) -> None:
    from transformers import AutoModelForCausalLM

    base = FIXTURES / "tiny-qwen2-base"
    written(plan_of(open_model(base).replace(container="torch"), max_shard_size=size, layout="pack"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    found, wanted = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "out", base))
    assert same(found, wanted)


def test_what_is_written_can_be_converted_again(model: Path, tmp_path: Path) -> None:
    written(torch_plan(model, max_shard_size=420_000), tmp_path / "out")
    written(plan_of(open_model(tmp_path / "out")), tmp_path / "back")
    assert same(load(tmp_path / "back"), expected(model))
