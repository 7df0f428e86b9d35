"""Healthy inputs beside the hostile ones: what is sound must pass the same watch, or the watch proves nothing."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path

from hostile.cases import (
    ADAPTER,
    BASE,
    DCP,
    ON_RANKS,
    VERL,
    ZERO,
    Case,
    adapter,
    entry,
    model,
    run,
    safetensors,
    with_config,
    without_weights,
)
from hostile.containers import FLOATS, tensor
from hostile.headers import one, single
from hostile.papers import log, recipe
from hostile.paths import cached
from hostile.pickles import in_model, zipped


def _linked(folder: Path) -> None:
    """A model folder that is a link, in which a file is a link to its neighbour."""
    root = model(folder, "real")
    (root / "blob").write_bytes((root / "tokenizer.json").read_bytes())
    (root / "tokenizer.json").unlink()
    (root / "tokenizer.json").symlink_to("blob")
    (folder / "m").symlink_to("real")


def _card(folder: Path) -> None:
    (model(folder) / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# Mine\n\nWords.\n")


def _large_index(folder: Path) -> None:
    """A file of 2,000 tensors."""
    header = {f"model.layers.{i}.w": entry([1], 4 * i, 4 * i + 4) for i in range(2_000)}
    (without_weights(folder) / "model.safetensors").write_bytes(safetensors(header, b"\0" * 8_000))


def _patterns(folder: Path) -> None:
    """The regular expressions that PEFT's users write."""
    changes = {
        "target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj)$",
        "rank_pattern": {"q_proj": 8, r"^model\.layers\.\d+\.self_attn\.k_proj": 8, "layers.0.*o_proj": 8},
        "alpha_pattern": {r".*\.0\.mlp\.up_proj": 16},
    }
    with_config(adapter(folder) / "adapter_config.json", **changes)


def _nothing(folder: Path) -> None:
    """The inputs are the shipped ones."""


_RECIPE = (
    f"version: 1\ninputs: {{source: {BASE}}}\nsteps:\n  - cast: {{dtype: float32}}\noutput: {{max-shard-size: 100KB}}\n"
)
_LOG = (
    b"epoch 1\nSome weights of X were not initialized from the model checkpoint at y and are newly initialized: "
    b"['score.weight']\n"
)
_ONE_LARGE = json.dumps({"w": entry([4], 0, 16), "__metadata__": {"format": "pt"}}).encode()

CASES: list[Case] = [
    Case(
        "base",
        0,
        _nothing,
        (f"inspect {BASE}", f"doctor {BASE}", f"reshard {BASE} out", f"push {BASE} me/x --dry-run"),
        harmless=True,
    ),
    Case("base-by-value", 0, _nothing, (f"diff {BASE} {BASE}",), harmless=True),
    Case(
        "adapter",
        0,
        adapter,
        ("inspect a", f"doctor a --base {BASE}", f"merge-lora a out --base {BASE}"),
        harmless=True,
    ),
    Case("adapter-peft", 0, adapter, (f"merge-lora a out --base {BASE} --numerics peft",), harmless=True),
    Case("adapter-pushed", 0, adapter, ("push a me/x --dry-run",), harmless=True),
    Case("adapter-patterns", 0, _patterns, (f"merge-lora a out --base {BASE}",), harmless=True),
    Case("converted", 0, adapter, (f"convert a out --to openrlhf --role reward --base {BASE}",), harmless=True),
    Case("zero", 0, partial(run, source=ZERO), ("inspect r", "gather r out", "doctor r", ON_RANKS), harmless=True),
    Case(
        "dcp",
        0,
        partial(run, source=DCP),
        ("inspect r", "gather r out --dry-run"),
        exits={"gather": (0, 2, 3)},
        harmless=True,
    ),
    Case("verl", 0, partial(run, source=VERL), ("inspect r", "gather r out", ON_RANKS), harmless=True),
    Case(
        "torch-file",
        0,
        partial(in_model, zipped(tensor(), {"0": FLOATS})),
        ("inspect m", "reshard m out"),
        harmless=True,
    ),
    Case(
        "torch-view",
        0,
        partial(in_model, zipped(tensor(offset=2, size=(2, 3), stride=(4, 1)), {"0": FLOATS})),
        ("reshard m out",),
        harmless=True,
    ),
    Case("one-tensor", 0, partial(single, one()), ("inspect m", "reshard m out"), harmless=True),
    Case(
        "one-file",
        0,
        partial(single, safetensors(_ONE_LARGE, struct.pack("<4f", 1, 2, 3, 4))),
        ("inspect m", "reshard m out --dtype bf16"),
        harmless=True,
    ),
    Case("many-tensors", 0, _large_index, ("inspect m", "reshard m out --dry-run"), harmless=True),
    Case("recipe", 0, partial(recipe, _RECIPE), ("run r.yaml out",), harmless=True),
    Case(
        "shipped-recipe",
        0,
        _nothing,
        (f"run merge-reward-lora out --input adapter={ADAPTER} --input source={BASE}",),
        harmless=True,
    ),
    Case("log", 0, partial(log, _LOG), ("explain train.log",), says="RANDOM|random", harmless=True),
    Case("card", 0, _card, ("push m me/x --dry-run",), harmless=True),
    Case("links", 0, _linked, ("inspect m", "reshard m out"), harmless=True),
    Case("cache", 0, partial(cached, _nothing), ("inspect me/m", "reshard me/m out"), harmless=True),
]
