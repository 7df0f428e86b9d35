"""Adapters over experts that are not what base and config say: refused by name, with nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.adapters import CONFIG
from oracle.bases import edit_config
from oracle.command import listing, run
from oracle.mixtures import MixtureBase, make_mixture

Tensors = dict[str, Any]
STEM = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtureBase, Path]:
    """A base and an adapter over all its stacks that merges."""
    folder = tmp_path_factory.mktemp("experts")
    base = make_mixture(folder / "base", "qwen3_moe")
    adapter = oracle.make_adapter(
        folder / "adapter", base, target_parameters=base.parameters, lora_dropout=0.0, target_modules=[]
    )
    assert run("merge-lora", adapter, folder / "out", "--base", base.path).code == 0
    return base, adapter


def refuses(adapter: Path, base: Path, *words: str) -> None:
    before = listing(adapter.parent)
    ran = run("merge-lora", adapter, adapter.parent / "out", "--base", base)
    assert ran.code == 3, ran.text
    assert not [w for w in words if w not in ran.text], ran.text
    assert "Traceback" not in ran.text
    assert listing(adapter.parent) == before


def without(*ends: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {k: v for k, v in t.items() if not k.endswith(ends)}


def with_one_expert_beside(t: Tensors) -> Tensors:
    return t | {
        f"{STEM}.1.down_proj.lora_A.weight": torch.ones(3, 20),
        f"{STEM}.1.down_proj.lora_B.weight": torch.ones(32, 3),
    }


ADAPTERS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], tuple[str, ...]]] = {
    "orphan A": (without("layers.0.mlp.experts.lora_B.weight"), {}, ("lora_B is missing",)),
    "orphan B": (without("layers.1.mlp.experts.base_layer.lora_A.weight"), {}, ("lora_A is missing",)),
    "level missing": (
        without("layers.0.mlp.experts.base_layer.lora_A.weight", "layers.0.mlp.experts.base_layer.lora_B.weight"),
        {},
        ("levels", "gate_up_proj"),
    ),
    "level too many": (
        lambda t: t | {k.replace("experts.", "experts.base_layer."): v.clone() for k, v in t.items()},
        {},
        ("levels",),
    ),
    "no targets and one level": (
        without(*(f"experts.base_layer.lora_{f}.weight" for f in "AB")),
        {"target_parameters": None},
        ("target_parameters",),
    ),
    "other rank": (dict, {"r": 4}, ("rank", "r = 4 for each of 4 experts")),
    "rank that does not divide": (
        lambda t: {k: v[:-1] if "lora_A" in k else v[:, :-1].contiguous() for k, v in t.items()},
        {},
        ("11 ranks", "4 experts"),
    ),
    "ranks of A and B differ": (lambda t: {k: v[:8] if "lora_A" in k else v for k, v in t.items()}, {}, ("rank",)),
    "other width": (
        lambda t: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in t.items()},
        {},
        ("do not fit", "matrices"),
    ),
    "all experts and one": (with_one_expert_beside, {}, ("all experts and of one",)),
    "expert past the last": (
        lambda t: {
            f"{STEM}.4.down_proj.lora_A.weight": torch.ones(3, 20),
            f"{STEM}.4.down_proj.lora_B.weight": torch.ones(32, 3),
        },
        {"target_parameters": None, "target_modules": ["down_proj"]},
        ("experts.4.down_proj", "expert 4", "has 4"),
    ),
    "DoRA": (dict, {"use_dora": True}, ("use_dora", "plain LoRA")),
    "lora_bias": (dict, {"lora_bias": True}, ("lora_bias", "plain LoRA")),
    "PiSSA": (dict, {"init_lora_weights": "pissa"}, ("init_lora_weights", "plain LoRA")),
    "empty": (lambda t: {k: v[:0] for k, v in t.items()}, {}, ("torch.Size",)),
    "stack by its own name in two dimensions": (
        lambda t: {k.replace("experts.lora", "experts.down_proj.lora"): v for k, v in t.items() if "base_l" not in k},
        {"target_parameters": None},
        ("experts.down_proj",),
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter_is_refused(case: str, sound: tuple[MixtureBase, Path], tmp_path: Path) -> None:
    change, config, words = ADAPTERS[case]
    base, adapter = sound
    broken = oracle.rewrite_adapter(adapter, tmp_path / "adapter", change=change)
    edit_config(broken, CONFIG, **config)
    refuses(broken, base.path, *words)


def renumbered(t: Tensors) -> Tensors:
    return {k.replace("experts.3.", "experts.7."): v for k, v in t.items()}


def with_a_stack_beside(t: Tensors) -> Tensors:
    return t | {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 32, 20)}


BASES: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], tuple[str, ...]]] = {
    "one expert more than config.json counts": (dict, {"num_experts": 3, "num_local_experts": 3}, ("3 experts",)),
    "one expert less": (
        lambda t: {k: v for k, v in t.items() if "experts.3." not in k},
        {},
        ("3 experts", "4 experts"),
    ),
    "numbers with a gap": (renumbered, {}, ("experts", "numbers")),
    "one tensor of an expert missing": (without("layers.0.mlp.experts.2.up_proj.weight"), {}, ("not whole",)),
    "a stack and single experts": (with_a_stack_beside, {}, ("one by one and as a stack",)),
}


@pytest.mark.parametrize("case", BASES)
def test_base_is_refused(case: str, sound: tuple[MixtureBase, Path], tmp_path: Path) -> None:
    change, config, words = BASES[case]
    base, adapter = sound
    shutil.copytree(base.path, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    oracle.write_tensors(tmp_path / "base", change(oracle.read_tensors(base.path)))
    edit_config(tmp_path / "base", **config)
    refuses(tmp_path / "adapter", tmp_path / "base", *words)
