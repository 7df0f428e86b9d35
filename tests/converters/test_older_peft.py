"""Adapters that PEFT before 0.14 saved: where its arithmetic was another one, neither is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import converter
from converter.errors import Refused

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip
LOKR = LoKrConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj"], decompose_both=True)
CROSSED = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2},
    alpha_pattern={"0.self_attn.q_proj": 32},
)  # fmt: skip
ALIKE = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 32}
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("older") / "base"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def saved(base: Path, folder: Path, config: Any, **changes: Any) -> Path:
    """A trained adapter; its config as PEFT before 0.14 wrote it, but for what is changed."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    value = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("exclude_modules", "peft_version")}
    path.write_text(json.dumps(value | changes))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}


def expect_pefts(base: Path, adapter: Path, out: Path) -> None:
    converter.merge_lora(adapter, out, base=base, numerics="peft")
    model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    expected = model.merge_and_unload().state_dict()
    found = weights(out)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("config", "words"), [(LOKR, "the scale of"), (CROSSED, "alpha of")], ids=["lokr", "patterns"])
def test_what_two_releases_compute_differently_is_refused_until_it_is_said(
    base: Path, tmp_path: Path, config: Any, words: str
) -> None:
    adapter = saved(base, tmp_path / "adapter", config)
    with pytest.raises(Refused, match=words) as caught:
        converter.merge_lora(adapter, tmp_path / "out", base=base)
    assert caught.value.code == "adapter-ambiguous"
    assert not (tmp_path / "out").exists()
    expect_pefts(base, saved(base, tmp_path / "newer", config, peft_version="0.14.0"), tmp_path / "out")


def test_lokr_whose_alpha_is_its_rank_is_merged(base: Path, tmp_path: Path) -> None:
    expect_pefts(base, saved(base, tmp_path / "adapter", LOKR, alpha=4), tmp_path / "out")


def test_patterns_that_mean_the_same_in_both_are_merged(base: Path, tmp_path: Path) -> None:
    expect_pefts(base, saved(base, tmp_path / "adapter", ALIKE), tmp_path / "out")


def test_a_config_that_nobody_saved_whole_is_taken_for_a_newer_one(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "adapter", LOKR)
    path = adapter / "adapter_config.json"
    value = json.loads(path.read_text())
    del value["layers_pattern"], value["revision"]
    path.write_text(json.dumps(value))
    expect_pefts(base, adapter, tmp_path / "out")
