"""Adapters that `merge-lora` does not take, refused by name; and values that are not numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle.bases import make_vision_base
from oracle.command import run
from oracle.workshop import Workshop


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_a_method_of_next_year", True),
        ("use_a_method_of_next_year", {"rank": 4}),
        ("use_a_method_of_next_year", "yes"),
        ("use_qalora", True),
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("layer_replication", [[0, 10**12]]),
        ("layer_replication", [[2, 0]]),
        ("layer_replication", "all"),
        ("kasa_config", {"alpha": 1.0}),
        ("use_bdlora", {"blocks": ["q_proj"]}),
        ("arrow_config", {"top_k": 2}),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("lora_ga_config", {"direction": "ArB2r"}),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_config_field_that_asks_for_something_unknown_is_refused_by_name(
    shop: Workshop, field: str, value: Any
) -> None:
    shop.refuses(shop.configured(**{field: value}), words=(field,))


@pytest.mark.parametrize(
    "init", ["corda", "loftq", "lora_ga", "pissa_niter_4", "pissa_niter_16", "an_init_of_next_year"]
)
def test_initialisation_that_cannot_be_rebuilt_is_refused_by_name(shop: Workshop, init: str) -> None:
    shop.refuses(shop.configured(init_lora_weights=init), words=(init,))


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_initialisation_that_cannot_be_rebuilt_needs_no_rebuilding_over_its_residual_base(
    shop: Workshop, init: str
) -> None:
    adapter = shop.configured(init_lora_weights=init)
    ran = run("merge-lora", adapter, shop.out, "--base", shop.base.path, "--base-is-residual", "--numerics", "peft")
    assert ran.code == 0, ran.err
    oracle.same_bits(oracle.read_tensors(shop.out), oracle.peft_merge(shop.base, shop.adapter))


PEFT_TYPES = [
    "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE",
    "XLORA", "POLY", "LILY", "SHADOW", "A_TYPE_OF_NEXT_YEAR",
]  # fmt: skip


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_peft_type_that_has_no_merge_is_refused_by_name(shop: Workshop, kind: str) -> None:
    shop.refuses(shop.configured(peft_type=kind), words=(kind,))


def test_the_adapters_inside_of_an_x_lora_are_named(shop: Workshop) -> None:
    inner = {"math": "hub/math-lora", "code": "./code"}
    shop.refuses(shop.configured(peft_type="XLORA", adapters=inner), words=("XLORA", "hub/math-lora", "./code"))


def test_dora_without_magnitudes_is_refused(shop: Workshop) -> None:
    """PEFT merges this with exit 0: it invents the magnitudes."""
    shop.refuses(shop.configured(use_dora=True), words=("use_dora", "magnitude"))


def test_magnitudes_without_dora_are_refused(shop: Workshop) -> None:
    adapter = oracle.make_adapter(shop.folder / "dora", shop.base, use_dora=True)
    shop.adapter = adapter
    shop.refuses(shop.configured(use_dora=False), words=("use_dora", "magnitude"))


def test_one_missing_magnitude_is_refused_by_name(shop: Workshop) -> None:
    shop.adapter = oracle.make_adapter(shop.folder / "dora", shop.base, use_dora=True)
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
    shop.refuses(shop.changed(lambda t: {k: v for k, v in t.items() if k != lost}), words=("up_proj", "magnitude"))


def test_lora_bias_over_a_layer_without_a_bias_is_refused(shop: Workshop) -> None:
    import torch

    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.bias"
    shop.adapter = shop.changed(lambda t: t | {name: torch.ones(83)})
    shop.refuses(shop.configured(lora_bias=True), words=("up_proj", "bias"))


def test_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """PEFT raises on merging it; a plain product would have the wrong shape."""
    base = make_vision_base(tmp_path / "base", "convnext")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["dwconv"], r=24)
    before = oracle.listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3
    assert "dwconv" in ran.text
    assert oracle.listing(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_values_that_were_not_finite_in_the_adapter_are_kept_once_they_are_allowed(
    shop: Workshop, value: float
) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name][7, 1] = value

    ran = run("merge-lora", shop.changed(spoil), shop.out, "--base", shop.base.path, "--allow", "nonfinite")
    assert ran.code == 0, ran.err
    assert "finite" in ran.text.lower()
    assert "up_proj" in ran.text
    found = oracle.read_tensors(shop.out)
    bad = {k: int((~v.isfinite()).sum()) for k, v in found.items() if not v.isfinite().all()}
    assert bad == {"model.layers.0.mlp.up_proj.weight": 48}  # row 7


def test_values_that_were_not_finite_in_the_base_are_kept_and_reported(shop: Workshop) -> None:
    base = oracle.make_base(shop.folder / "spoiled")
    tensors = oracle.read_tensors(base.path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("inf")
    oracle.write_tensors(base.path, tensors)
    ran = run("merge-lora", shop.adapter, shop.out, "--base", base.path)
    assert ran.code == 0, ran.err
    assert "finite" in ran.text.lower()
    assert not oracle.read_tensors(shop.out)["model.layers.0.mlp.up_proj.weight"][3, 4].isfinite()


@pytest.mark.parametrize("numerics", ["best", "peft"])
def test_float16_that_overflows_stops_the_run_with_the_tensor_and_the_count(numerics: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", dtype="float16")
    tensors = oracle.read_tensors(base.path)
    tensors["model.layers.0.mlp.up_proj.weight"][:2, :3] = 65000.0
    oracle.write_tensors(base.path, tensors)
    made = oracle.make_adapter(tmp_path / "made", base, target_modules=["up_proj"])

    def grow(tensors: dict[str, Any]) -> None:
        layer = "base_model.model.model.layers.0.mlp.up_proj"
        tensors[f"{layer}.lora_A.weight"].fill_(40.0)
        tensors[f"{layer}.lora_B.weight"].fill_(40.0)  # 3 * 1600 * 5/3 = 8000 more in every element

    adapter = oracle.rewrite_adapter(made, tmp_path / "adapter", change=grow)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path, "--numerics", numerics)
    assert ran.code == 4, ran.err
    assert "model.layers.0.mlp.up_proj.weight" in ran.text
    assert re.search(r"\b6\b", ran.err), ran.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    assert "out.partial" in ran.text
