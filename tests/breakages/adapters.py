"""Breakages of adapters that PEFT wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from breakages.sound import HIDDEN, PT, Breakage, Tensors, beside, edit, store

FILE = "adapter_model.safetensors"
Change = Callable[[Path], object]


def having(change: Callable[[Tensors], Tensors]) -> Change:
    return lambda f: store(f, change, FILE)


def config(**changes: Any) -> Change:
    return lambda f: edit(f, "adapter_config.json", **changes)


def twin(folder: Path) -> None:
    """As OpenRLHF up to 0.5.5 leaves it after ZeRO-3: the good file pickled, the empty one beside."""
    torch.save(load_file(folder / FILE), folder / "adapter_model.bin")
    store(folder, lambda t: {n: torch.empty(0) for n in t}, FILE)


def head_with_lora(t: Tensors) -> Tensors:
    rest = {n: v for n, v in t.items() if "score" not in n}
    stem = "base_model.model.score"
    return rest | {f"{stem}.lora_A.weight": torch.ones(2, HIDDEN), f"{stem}.lora_B.weight": torch.ones(1, 2)}


def both(*changes: Change) -> Change:
    return lambda f: [change(f) for change in changes]


def tied_to(folder: Path) -> None:
    """A base whose embeddings are one, and an adapter with a copy of each that differ."""
    beside(folder, "tied", "whole")
    edit(folder, "adapter_config.json", modules_to_save=["embed_tokens", "lm_head"])
    shape = (32, HIDDEN)
    own = {"base_model.model.model.embed_tokens.weight": torch.ones(shape),
           "base_model.model.lm_head.weight": torch.zeros(shape)}  # fmt: skip
    store(folder, lambda t: {**t, **own}, FILE)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"

ADAPTERS: dict[str, Breakage] = {
    "adapter-empty-twin": Breakage("adapter", twin, "mended"),
    "adapter-empty": Breakage("adapter", having(lambda t: {}), "lost"),
    "adapter-and-model": Breakage(
        "adapter", lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors", metadata=PT), "told"
    ),
    "adapter-config-missing": Breakage("adapter", lambda f: (f / "adapter_config.json").unlink(), "advice"),
    "adapter-config": Breakage("adapter", config(lora_alpha="much"), "advice"),
    "adapter-shape": Breakage(
        "adapter",
        having(lambda t: {n: v.repeat(1, 2) if n.endswith("lora_A.weight") else v for n, v in t.items()}),
        "advice",
    ),
    "adapter-rank": Breakage("adapter", config(r=16), "advice"),
    "adapter-half": Breakage(
        "adapter", having(lambda t: {n: v for n, v in t.items() if "v_proj.lora_A" not in n}), "lost"
    ),
    "adapter-targets-missing": Breakage(
        "adapter", having(lambda t: {n: v for n, v in t.items() if "layers.0" not in n}), "advice"
    ),
    "adapter-incomplete": Breakage(
        "adapter", having(lambda t: {**t, f"{LAYER}.lora_magnitude_vector": torch.ones(16)}), "advice"
    ),
    "adapter-unexpected": Breakage(
        "adapter", having(lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(16)}), "advice"
    ),
    "adapter-unmatched": Breakage(
        "adapter", having(lambda t: {n.replace("layers.0", "layers.9"): v for n, v in t.items()}), "advice"
    ),
    "adapter-field-unknown": Breakage("adapter", config(use_something_new=True), "advice"),
    "adapter-pattern": Breakage("adapter", config(rank_pattern={"(?P<x": 4}), "advice"),
    "adapter-field-unsupported": Breakage("adapter", config(layer_replication=[[0, 1], [0, 1]]), "advice"),
    "adapter-base-moved": Breakage("adapter", config(init_lora_weights="corda"), "advice"),
    "adapter-bias": Breakage(
        "adapter",
        both(
            config(lora_bias=True),
            having(lambda t: {**t, **{n.replace("weight", "bias"): torch.ones(16) for n in t if "lora_B" in n}}),
        ),
        "advice",
    ),
    "adapter-tokens": Breakage("adapter", config(trainable_token_indices=[1, 99]), "advice"),
    "vocab-mismatch": Breakage(
        "adapter", having(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(40, 16)}), "advice"
    ),
    "peft-type-unsupported": Breakage("adapter", config(peft_type="LOHA"), "advice"),
    "peft-type-unmergeable": Breakage("adapter", config(peft_type="PROMPT_TUNING"), "advice"),
    "lora-alpha-zero": Breakage("adapter", config(lora_alpha=0), "advice"),
    "no-op": Breakage(
        "adapter", having(lambda t: {n: torch.zeros_like(v) if "lora_B" in n else v for n, v in t.items()}), "lost"
    ),
    "adapter-keys-named": Breakage(
        "adapter", having(lambda t: {n.replace(".weight", ".default.weight"): v for n, v in t.items()}), "mended"
    ),
    "base-differs": Breakage("adapter", lambda f: beside(f, "whole", "another"), "told", ("--base", "{here}/another")),
    "base-quantised": Breakage(
        "adapter",
        lambda f: edit(beside(f, "whole", "whole"), quantization_config={"quant_method": "fp8"}),
        "advice",
        ("--base", "{here}/whole"),
    ),
    "tied-copies-differ": Breakage("adapter", tied_to, "advice", ("--base", "{here}/whole")),
    "head-base-lost": Breakage("reward-adapter", having(head_with_lora), "lost"),
    "head-missing-adapter": Breakage(
        "reward-adapter", having(lambda t: {n: v for n, v in t.items() if "score" not in n}), "lost"
    ),
    "task-type-wrong": Breakage("reward-adapter", config(task_type="CAUSAL_LM"), "advice"),
    "pair-lora": Breakage(
        "adapter",
        lambda f: edit(beside(f, "adapter", "actor"), "adapter_config.json", r=4),
        "told",
        ("--with-actor", "{here}/actor"),
    ),
}
