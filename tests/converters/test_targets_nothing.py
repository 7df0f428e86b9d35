"""A config that puts adapters on no module at all: PEFT stops at it, and factors that it places nowhere are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import oracle
from oracle.bases import edit_config
from oracle.command import listing, run

FIELDS: list[dict[str, Any]] = [
    {"target_modules": []},
    {"target_modules": 7},
    {"layers_to_transform": [70]},
    {"layers_to_transform": [-1]},
    {"layers_to_transform": 70},
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> oracle.Base:
    return oracle.make_base(tmp_path_factory.mktemp("base") / "base", request.param)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_factors_that_a_config_places_nowhere_are_refused_with_the_base_at_hand(
    fields: dict[str, Any], base: oracle.Base, tmp_path: Path
) -> None:
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    assert run("merge-lora", adapter, tmp_path / "sound", "--base", base.path).code == 0
    edit_config(adapter, "adapter_config.json", **fields)
    before = listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert (ran.code, "adapter-untargeted" in ran.err) == (3, True), ran.err
    assert listing(tmp_path) == before
    assert "adapter-untargeted" in run("doctor", adapter, "--base", base.path).out
    with pytest.raises((ValueError, TypeError, KeyError)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), str(adapter))
