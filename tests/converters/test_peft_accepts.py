"""Inputs that PEFT loads, merges and saves without an error, though it merges not all of them: refused here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.adapters import CONFIG
from oracle.bases import Base, edit_config
from oracle.command import listing, run

Tensors = dict[str, Any]
P = "base_model.model.model.layers"


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {k.replace(old, new): v for k, v in held.items()}


def without(word: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {k: v for k, v in held.items() if word not in k}


def spoilt(held: Tensors) -> Tensors:
    name = f"{P}.0.self_attn.q_proj.lora_B.weight"
    value = held[name].clone()
    value[0, 0] = float("nan")
    return held | {name: value}


def nothing(held: Tensors) -> Tensors:
    return {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in held.items()}


MAGNITUDE = {f"{P}.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(48)}
ACCEPTED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "names that match nothing": (renamed("_proj.", "_projection."), {}, "adapter-unmatched"),
    "one name that matches nothing": (renamed("1.mlp.up_proj", "1.mlp.upward"), {}, "adapter-unmatched"),
    "a layer that the base does not have": (renamed("layers.1.", "layers.7."), {}, "adapter-unmatched"),
    "a layer without its factors": (without("layers.1."), {}, ""),
    "a module without its factors": (without("layers.1.mlp.up_proj"), {}, "adapter-targets-missing"),
    "a tensor that is nobody's": (lambda h: h | {"base_model.model.step": torch.ones(1)}, {}, ""),
    "A without B": (without("0.self_attn.q_proj.lora_B"), {}, "adapter-incomplete"),
    "B without A": (without("0.self_attn.q_proj.lora_A"), {}, "adapter-incomplete"),
    "DoRA without magnitudes": (dict, {"use_dora": True}, "adapter-incomplete"),
    "magnitudes without DoRA": (lambda h: h | MAGNITUDE, {}, ""),
    "a switch that nobody knows": (dict, {"use_quantum": True}, "adapter-field-unknown"),
    "values that are not numbers": (spoilt, {}, ""),
    "an update of nothing": (nothing, {}, ""),
    "an alpha of 0": (dict, {"lora_alpha": 0}, ""),
    "a start that is drawn anew": (dict, {"init_lora_weights": "pissa_niter_4"}, "adapter-base-moved"),
}
OFTEN = ("one name that matches nothing", "A without B")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    folder = tmp_path_factory.mktemp("accepted")
    base = oracle.make_base(folder / "base", "llama")
    return base, oracle.make_adapter(folder / "adapter", base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in ACCEPTED])
def test_peft_accepts_it_and_it_is_refused_here(name: str, sound: tuple[Base, Path], tmp_path: Path) -> None:
    change, settings, code = ACCEPTED[name]
    base, adapter = sound
    broken = oracle.rewrite_adapter(adapter, tmp_path / "adapter", change=change)
    if settings:
        edit_config(broken, CONFIG, **settings)
    assert sorted(oracle.peft_merge(base, broken)) == sorted(oracle.read_tensors(base.path))
    before = listing(tmp_path)
    ran = run("merge-lora", broken, tmp_path / "out", "--base", base.path)
    assert ran.code == 3, ran.text
    assert f"REFUSED {code}" in ran.text
    assert listing(tmp_path) == before
