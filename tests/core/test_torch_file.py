"""Files of torch.save, read without torch: every value equals what torch.load gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.core.formats.torch_file import Opaque, read_torch_file
from converter.core.tensors.nodes import Stored, Strided
from converter.errors import Refused
from oracle.torch_files import SAVES, loaded, save, values


def _equal(a: Any, b: Any) -> bool:
    if isinstance(b, torch.Tensor):
        same = isinstance(a, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        if not same or not b.dim():
            return bool(same and a.item() == b.item())
        return bool(a.contiguous().view(torch.uint8).equal(b.detach().contiguous().view(torch.uint8)))
    if isinstance(b, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in b)
    if isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("name", list(values()))
def test_values_equal_those_of_torch_load(tmp_path: Path, name: str, how: str) -> None:
    value = values()[name]
    if name == "dtypes" and how.startswith("old"):
        newer = ("float8", "uint16", "uint32", "uint64")
        value = {k: v for k, v in value.items() if not any(n in k for n in newer)}
    path = save(tmp_path / "x.pt", value, how)
    oracle = torch.load(path, weights_only=False)  # noqa: TID251
    assert _equal(loaded(read_torch_file(path).value), oracle)


def test_storages_of_subclassed_tensors_are_not_mistaken_for_one_another(tmp_path: Path) -> None:
    """DeepSpeed's flat groups are such tensors; two of them once came out as the first, twice."""

    def tagged(i: int) -> torch.Tensor:
        found = torch.full((i + 1,), float(i))
        found.tag = i  # type: ignore[attr-defined]
        return found

    path = save(tmp_path / "x.pt", [tagged(i) for i in range(50)])
    assert b"_rebuild_from_type_v2" in path.read_bytes()
    assert _equal(loaded(read_torch_file(path).value), [torch.full((i + 1,), float(i)) for i in range(50)])


def test_a_dtensor_gives_its_local_tensor_and_its_placement_without_a_process_group(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        whole = torch.arange(12.0).reshape(4, 3)
        shared = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
        path = save(tmp_path / "x.pt", {"w": shared, "p": torch.nn.Parameter(shared)})
    finally:
        dist.destroy_process_group()
    found = read_torch_file(path).value
    for name in ("w", "p"):
        assert found[name].args[0].path == "torch.distributed.tensor.DTensor"
        state = found[name].state[1] if isinstance(found[name].state, tuple) else found[name].state
        assert torch.equal(loaded(state["_local_tensor"]), whole)
        assert "Shard" in str(state["_spec"])


def test_views_of_one_storage_read_only_their_own_bytes(tmp_path: Path) -> None:
    flat = torch.arange(100, dtype=torch.float32)
    path = save(tmp_path / "x.pt", {"a": flat[:40], "b": flat[40:].view(6, 10), "t": flat.view(10, 10).t()})
    found = read_torch_file(path).value
    assert isinstance(found["a"], Stored)
    assert isinstance(found["t"], Strided)
    assert found["b"].offset - found["a"].offset == 160
    assert len(read_torch_file(path).checks) == 1


def test_unknown_objects_are_data(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"args": __import__("argparse").Namespace(lr=0.1), "n": Counter(a=2)})
    found = read_torch_file(path).value
    assert isinstance(found["args"], Opaque)
    assert found["args"].path == "argparse.Namespace"
    assert found["args"].state == {"lr": 0.1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
    ],
    ids=["quantised", "sparse-coo", "sparse-csr"],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(Refused) as caught:
        read_torch_file(save(tmp_path / "x.pt", {"w": make()}))
    assert caught.value.code in ("torch-tensor-kind", "pickle-names")


def test_a_repeated_element_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="repeats"):
        read_torch_file(save(tmp_path / "x.pt", torch.ones(1).expand(1000)))


def test_files_without_checksums_are_read_and_have_nothing_to_compare(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "x.pt", {"w": torch.arange(9.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_torch_file(path)
    assert _equal(loaded(found.value), {"w": torch.arange(9.0)})
    assert not found.checks
