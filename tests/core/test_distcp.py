"""Distributed checkpoints that are written here, loaded by torch's own planner; torch is the oracle of every byte."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from converter.core.checkpoint import SideFile
from converter.core.files.opening import identity
from converter.core.formats import torch_zip_writer as torch_zip
from converter.core.formats.dcp_metadata import METADATA, default_paths
from converter.core.formats.pickle_writer import write_pickle
from converter.core.formats.safetensors_io import read_header
from converter.core.tensors import nodes
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.core.writer.distcp import Blob, Box, Distributed, file_name, lay_out_distcp
from converter.core.writer.plan import Plan
from converter.core.writer.shard_plan import from_json, to_json
from converter.core.writer.write import write
from converter.errors import Refused
from durability import Quiet, fast_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
"""torch's loader warns of its own ways: that there is no process group, that typed storages will go."""

LOAD = Path(__file__).parents[1] / "runs" / "dcp" / "load.py"
TENSORS = {
    "weight": torch.randn(8, 6),
    "bias": torch.randn(5).bfloat16(),
    "half": torch.randn(3, 2, 2).half(),
    "scale": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
    "codes": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "steps": torch.arange(7),
    "mask": torch.tensor([True, False, True]),
}
SPREAD = {"count": 3, "words": ["a", "b"], "nested": {"rate": 0.5}}


@pytest.fixture(scope="module")
def saved() -> Iterator[Path]:
    """A distributed checkpoint: `weight` in three boxes of two files, everything else whole, and an object."""
    with fast_folder() as folder:
        (folder / "in").mkdir()
        save_file(TENSORS, folder / "in" / "all.safetensors")
        lazy = opened(folder / "in" / "all.safetensors")
        upper, lower = nodes.narrow(lazy["weight"], 0, 0, 5), nodes.narrow(lazy["weight"], 0, 5, 3)
        boxes = {n: (whole(t),) for n, t in lazy.items()}
        boxes["weight"] = (
            Box((0, 0), nodes.narrow(upper, 1, 0, 2), file_name(0)),
            Box((0, 2), nodes.narrow(upper, 1, 2, 4), file_name(0)),
            Box((5, 0), lower, file_name(1)),
        )
        made = {f"app.model.{n}": Distributed(lazy[n].info.shape, b) for n, b in boxes.items()}
        blobs = {"app.spread": Blob(torch_zip.tensorless(write_pickle(SPREAD, reference=id)), file_name(1))}
        paths = default_paths([*made], ("app", "model")) | {"app.spread": ("app", "spread")}
        shards, metadata = lay_out_distcp(made, blobs, paths=paths)
        assert [from_json(json.loads(json.dumps(to_json(s)))) for s in shards] == list(shards)
        inputs = {str(folder / "in" / "all.safetensors"): identity(folder / "in" / "all.safetensors")}
        plan = Plan(shards, {METADATA: SideFile(content=metadata)}, inputs, {}, {})
        write(plan, folder / "out", reporter=Quiet())
        yield folder / "out"


def opened(path: Path) -> dict[str, LazyTensor]:
    header = read_header(path)
    return {n: nodes.stored(i, str(path), header.data_start + start) for n, (i, start, _) in header.tensors.items()}


def whole(tensor: LazyTensor) -> Box:
    return Box((0,) * len(tensor.info.shape), tensor, file_name(0))


def differences(found: Mapping[str, Any]) -> list[str]:
    """Names of what isn't, bit by bit, what was saved."""
    return [n for n, t in TENSORS.items() if bits(found[n]) != bits(t)]


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
    return tensor.dtype, tensor.shape, raw.numpy().tobytes()


def test_one_process_loads_what_was_saved(saved: Path) -> None:
    state: dict[str, Any] = {"model": {n: torch.zeros_like(t) for n, t in TENSORS.items()}, "spread": None}
    dcp.load({"app": state}, checkpoint_id=str(saved), no_dist=True)
    assert differences(state["model"]) == []
    assert state["spread"] == SPREAD


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_of_several_ranks_loads_its_own_rows(saved: Path, rank: int) -> None:
    """Its collectives do nothing, so that each rank's plan is made and read as among others."""
    dist.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (3,))
        state = {
            f"app.model.{n}": distribute_tensor(torch.zeros_like(t), mesh, [Shard(0)], src_data_rank=None)
            for n, t in TENSORS.items()
            if t.dim() and t.numel() and n != "codes"
        }
        dcp.load(state, checkpoint_id=str(saved), no_dist=True)
    finally:
        dist.destroy_process_group()
    for key, value in state.items():
        rows = TENSORS[key.removeprefix("app.model.")].chunk(3)
        mine = rows[rank] if rank < len(rows) else rows[0][:0]
        assert torch.equal(value.to_local(), mine), key


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_talk_to_each_other_load_what_was_saved(saved: Path, ranks: int, tmp_path: Path) -> None:
    out = tmp_path / "loaded.safetensors"
    subprocess.run([sys.executable, LOAD, saved, out, "--ranks", str(ranks)], check=True, capture_output=True)
    found = {k.removeprefix("app.model."): t for k, t in load_file(out).items()}
    assert differences(found) == []


def test_torch_makes_the_nest_of_dictionaries_again(saved: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(str(saved), tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)  # noqa: TID251 - torch wrote it
    assert found.keys() == {"app"}
    assert differences(found["app"]["model"]) == []
    assert found["app"]["spread"] == SPREAD


def test_records_are_what_torch_saves(saved: Path) -> None:
    """Each tensor's stretch of the file is a file of torch.save, as large as torch's own."""
    metadata = dcp.FileSystemReader(saved).read_metadata()
    stretches = {
        (index.fqn.rpartition(".")[2], tuple(index.offset or ())): info
        for index, info in metadata.storage_data.items()
        if index.fqn != "app.spread"
    }
    for (name, offsets), info in stretches.items():
        with (saved / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            raw = file.read(info.length)
        found = torch.load(io.BytesIO(raw), weights_only=True)  # noqa: TID251 - the oracle
        own = io.BytesIO()
        torch.save(found, own)
        assert len(own.getvalue()) == len(raw), name
        if not offsets or not any(offsets):
            assert found.dtype == TENSORS[name].dtype


def test_boxes_that_are_no_tensor_are_refused(saved: Path) -> None:
    lazy = opened(saved.parent / "in" / "all.safetensors")
    with pytest.raises(Refused, match="don't make up a tensor") as caught:
        lay_out_distcp({"weight": Distributed((9, 6), (whole(lazy["weight"]),))})
    assert caught.value.code == "dcp-chunks"
    other = Box((8, 0), nodes.cast(nodes.narrow(lazy["weight"], 0, 0, 1), DType.BF16), file_name(0))
    with pytest.raises(Refused, match="don't make up"):
        lay_out_distcp({"weight": Distributed((9, 6), (whole(lazy["weight"]), other))})
    with pytest.raises(Refused, match="holds no tensor"):
        lay_out_distcp({"a": Distributed((8, 6), (whole(lazy["weight"]),))}, {"b": Blob(b"", file_name(7))})
