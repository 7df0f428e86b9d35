"""Small model folders written by the real safetensors library, and what is in the folders that we write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.writer.plan import Plan, make_plan
from converter.core.writer.write import Receipt, write
from converter.sources.hf.source import SOURCE
from durability import Quiet, tree

Tensors = dict[str, torch.Tensor]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def save_model(folder: Path, *shards: Tensors, **config: Any) -> Path:
    """A model folder: one file, or several with their index; a config and one side file."""
    folder.mkdir(parents=True)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(t.nbytes for shard in shards for t in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def open_model(folder: Path) -> Checkpoint:
    """The folder as a checkpoint."""
    return SOURCE.open(folder, asked=folder.name)


def plan_of(checkpoint: Checkpoint, **layout: Any) -> Plan:
    """Its plan, with a provenance like a recipe's."""
    return make_plan(checkpoint, context=Context(), provenance={"recipe": "a test's"}, **layout)


def written(plan: Plan, out: Path, **options: Any) -> Receipt:
    """Write a plan, with one worker unless told otherwise."""
    return write(plan, out, **{"reporter": Quiet(), "jobs": 1} | options)


def half_cast(folder: Path, **layout: Any) -> Plan:
    """A plan over `folder / "model"`, made if it is missing: three files, a copied and a cast tensor in each."""
    shards = [{f"copied.{i}": numbers(90, 5, seed=i), f"cast.{i}": numbers(30, 5, seed=9 + i)} for i in range(3)]
    model = folder / "model" if (folder / "model").exists() else save_model(folder / "model", *shards)
    given = open_model(model)
    cast = {n: tensors.cast(t, DType.BF16) for n, t in given.tensors.items() if n.startswith("cast")}
    return plan_of(given.replace(tensors={**given.tensors, **cast}), **layout)


def finish(plan: Plan, out: Path, **options: Any) -> Quiet:
    """Write a plan where an earlier run may have begun; the result is what one run makes. Says what was resumed."""
    reporter = Quiet()
    written(plan, out, reporter=reporter, **options)
    written(plan, out.with_name("other"))
    assert tree(out) == tree(out.with_name("other"))
    assert sorted(os.listdir(out.parent)) == ["model", "other", "out"]
    return reporter


def load(folder: Path) -> Tensors:
    """Every tensor of a folder, as the real library reads them."""
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def contents(folder: Path) -> dict[str, list[str]]:
    """Tensor names of each weight file, in the order in which they lie in it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        header = header_of(file)
        header.pop("__metadata__")
        found[file.name] = sorted(header, key=lambda name: header[name]["data_offsets"])
    return found


def header_of(file: Path) -> dict[str, Any]:
    """The header, as it stands in the file."""
    raw = file.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def data_of(file: Path) -> bytes:
    """What follows the header."""
    raw = file.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """The same names, dtypes, shapes and bits."""
    return found.keys() == expected.keys() and all(
        found[n].dtype is t.dtype
        and found[n].shape == t.shape
        and torch.equal(found[n].reshape(-1).view(torch.uint8), t.contiguous().reshape(-1).view(torch.uint8))
        for n, t in expected.items()
    )


def metadata_of(file: Path) -> dict[str, str]:
    """`__metadata__`, as the real library reads it."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())
