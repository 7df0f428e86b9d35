"""A config that puts adapters on no module at all: PEFT stops at it, and factors that it places nowhere are refused."""

from __future__ import annotations

import json
import warnings
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


def named(adapter: Path) -> list[str]:
    """The words by which the config of a made adapter names its modules."""
    words = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    return sorted(words)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("way", ["list", "list with another word", "pattern", "excluded"])
def test_factors_that_peft_would_pass_over_are_refused_with_the_base_at_hand(
    way: str, kept: int, base: oracle.Base, tmp_path: Path
) -> None:
    """PEFT loads such an adapter without those factors, and says no more than that keys were unexpected."""
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    words = named(adapter)
    fields: dict[str, Any] = {
        "list": {"target_modules": words[:kept]},
        "list with another word": {"target_modules": [*words[:kept], "nothing_here"]},
        "pattern": {"target_modules": rf".*\.({'|'.join([*words[:kept], 'nothing_here'])})"},
        "excluded": {"exclude_modules": words[kept:]},
    }[way]
    edit_config(adapter, "adapter_config.json", **fields)
    before = listing(tmp_path)
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert (ran.code, "adapter-untargeted" in ran.err) == (3, True), ran.err
    assert listing(tmp_path) == before
    assert "adapter-untargeted" in run("doctor", adapter, "--base", base.path).out
    model = AutoModelForCausalLM.from_pretrained(base.path)
    if kept == 0:
        with pytest.raises(ValueError, match=r"[Tt]arget[ _]modules|No modules were targeted"):
            PeftModel.from_pretrained(model, str(adapter))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(model, str(adapter))
    lost = {w for w in words if not any(f".{w}.lora_A" in name for name in loaded.state_dict())}
    assert lost == {*words[kept:]}


def test_modules_under_either_of_their_names_are_targeted(tmp_path: Path) -> None:
    """GPT-NeoX's head is `embed_out` on disk and `lm_head` in memory: a config may have the one, the keys the other."""
    base = oracle.make_base(tmp_path / "base", "gpt_neox")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, target_modules=["lm_head", "dense"])
    edit_config(adapter, "adapter_config.json", target_modules=["embed_out", "dense"])
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 0, ran.err
