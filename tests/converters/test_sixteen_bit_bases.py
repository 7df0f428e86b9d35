"""Adapters over 16-bit bases whose arithmetic rounds the base too, and factors that a small matrix cuts short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import converter
import oracle
from oracle.bases import quiet, read_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> oracle.Base:
    return oracle.make_base(tmp_path_factory.mktemp("sixteen") / "base", dtype="bfloat16")


def saved(base: oracle.Base, folder: Path, config: Any, task: str = "CAUSAL_LM") -> Path:
    """An adapter whose trained tensors moved a little."""
    more = {"num_labels": 1, "pad_token_id": 0} if task == "SEQ_CLS" else {}
    with quiet():
        model = peft.get_peft_model(base.load(task=task, **more), config)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 20
        model.save_pretrained(folder)
    return folder


def test_osf_before_peft_0_21_puts_the_weight_together_of_rounded_directions(base: oracle.Base, tmp_path: Path) -> None:
    """PEFT 0.20: `U_high S_high V_high + U_low S_low V_low`, the frozen ones stored in the base's dtype."""
    adapter = saved(base, tmp_path / "adapter", peft.OSFConfig(effective_rank=4, target_modules=["q_proj"]))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.20.0"}))
    converter.merge_lora(adapter, tmp_path / "out", base=base.path)
    before, after, factors = read_tensors(base.path), read_tensors(tmp_path / "out"), read_tensors(adapter)
    names = [n for n in after if "q_proj.weight" in n]
    for name in names:
        stem = f"base_model.model.{name.removesuffix('.weight')}.osf_svd_params"
        low = {part: factors[f"{stem}.{part}"].float() for part in ("U_low", "S_low", "V_low")}
        u, s, v = torch.linalg.svd(before[name].float(), full_matrices=False)
        kept = len(s) - len(low["S_low"])
        u, s, v = (x.bfloat16().float() for x in (u[:, :kept], s[:kept], v[:kept]))
        exact = (u * s) @ v + (low["U_low"] * low["S_low"]) @ low["V_low"]
        nearest = exact.bfloat16().float()
        assert ((after[name].float() - exact).abs() <= (nearest - exact).abs() + 1e-6).all()
        assert (after[name] != before[name]).any()
    assert len(names) == 2


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_is_a_decomposition_has_no_more_ranks_than_the_matrix(
    base: oracle.Base, tmp_path: Path, start: str
) -> None:
    """The head of one label: PEFT asks for rank 3 and gets 1, with the scale of rank 3."""
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=start, target_modules=["q_proj", "score"])
    adapter = saved(base, tmp_path / "adapter", config, task="SEQ_CLS")
    assert read_tensors(adapter)["base_model.model.score.lora_A.weight"].shape[0] == 1
    with quiet():
        head = base.load(task="SEQ_CLS", num_labels=1, pad_token_id=0)
        head.save_pretrained(tmp_path / "classifier")
        whole: Any = peft.PeftModel.from_pretrained(head, adapter)
        expected = whole.merge_and_unload().state_dict()
    converter.merge_lora(adapter, tmp_path / "out", base=tmp_path / "classifier", numerics="peft")
    found = read_tensors(tmp_path / "out")
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert "score.weight" in found
