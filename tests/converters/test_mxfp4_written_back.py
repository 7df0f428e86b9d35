"""`--requantize same` over gpt-oss' experts: the nearest codes under the scales of its own packer's rule."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import oracle
from gpt_oss import as_transformers_loads, small_gpt_oss
from oracle.adapters import with_card
from oracle.bases import quiet, read_config, read_tensors
from oracle.command import listing, merged, run

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and exponents `[experts, rows, groups]` of a stack `[experts, inner, rows]`, by search, in fp64."""
    experts, inner, rows = weight.shape
    groups = weight.double().transpose(1, 2).reshape(experts, rows, inner // 32, 32)
    largest = groups.abs().amax(-1)
    power = torch.tensor([math.ceil(math.log2(v / 6)) for v in largest.flatten().tolist()]).view(largest.shape)
    scale = (2.0 ** power.double()).unsqueeze(-1)
    # Of two that are equally near the larger: the table is searched from its end.
    table = torch.tensor(E2M1[::-1], dtype=torch.float64)
    magnitude = table[((groups.abs() / scale).unsqueeze(-1) - table).abs().argmin(-1)]
    values = (magnitude * groups.sign() * scale).reshape(experts, rows, inner).transpose(1, 2)
    return values, power + 127


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`base` and `adapter`; the experts dequantised by transformers, and PEFT's merge into them in fp32."""
    import peft

    home = tmp_path_factory.mktemp("mxfp4")
    small_gpt_oss(home / "base")
    before = as_transformers_loads(home / "base", transformers.Mxfp4Config(dequantize=True))
    with quiet():
        config = transformers.Mxfp4Config(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            home / "base", quantization_config=config, dtype=torch.bfloat16
        ).float()
        lora = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=EXPERTS)
        wrapped = peft.get_peft_model(model, lora)
        generator = torch.Generator().manual_seed(4)
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.data.copy_(torch.randn(value.shape, generator=generator) * 0.05)
        wrapped.save_pretrained(with_card(home / "adapter"))
        after = {n: p.detach().clone() for n, p in wrapped.merge_and_unload().state_dict().items()}
    return home, before, after


def test_experts_are_the_nearest_codes_under_their_packers_scales(made: Any, tmp_path: Path) -> None:
    home, before, exact = made
    ran = merged(home / "adapter", tmp_path / "out", "--base", home / "base", "--requantize", "same")
    assert "rounded a second time" in ran.text
    old, new = read_tensors(home / "base"), read_tensors(tmp_path / "out")
    assert new.keys() == old.keys() and read_config(tmp_path / "out") == read_config(home / "base")
    live = as_transformers_loads(tmp_path / "out", transformers.Mxfp4Config(dequantize=True))
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())["tensors"]
    stacks = [n for n in exact if n.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacks) == 4
    for name in stacks:
        values, exponents = nearest(exact[name])
        assert torch.equal(new[f"{name}_scales"].long(), exponents.long())
        # Ours is summed in another order: a value within fp32's last bits of a boundary may fall to its other side.
        assert (live[name].double() != values).sum() <= 2
        error = float((values - exact[name].double()).norm() / exact[name].double().norm())
        found = receipt[f"{name}_blocks"]
        assert found["requantised_relative_error"] == pytest.approx(error, rel=1e-3) and 0.02 < error < 0.2
        assert found["codes_changed"] == int((live[name] != before[name]).sum()) > 0
    assert all(torch.equal(new[n], old[n]) for n in new if "experts" not in n and "q_proj.weight" not in n)


def test_what_was_in_the_format_already_is_written_as_the_same_values() -> None:
    """Scales of the packer's rule lose nothing of values that four bits hold."""
    from converter.core.compute.dequantising import mxfp4, mxfp4_blocks, mxfp4_scales

    generator = torch.Generator().manual_seed(6)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 254, (3, 10, 2), generator=generator, dtype=torch.uint8).clamp(min=4)
    blocks[1, 2, 0] = 0
    whole = mxfp4([blocks, scales], {"out": "F32"})
    codes, said = mxfp4_blocks([whole], {})
    assert torch.equal(mxfp4([codes, mxfp4_scales([whole], {})], {"out": "F32"}), whole)
    assert said["requantised_error"] == 0


def test_an_update_that_no_code_feels_is_refused(made: Any, tmp_path: Path) -> None:
    home, _, _ = made

    def weaker(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: v * 1e-7 for k, v in tensors.items() if "experts" in k}

    lost = oracle.rewrite_adapter(home / "adapter", tmp_path / "lost", change=weaker)
    shutil.copy(home / "adapter" / "adapter_config.json", lost / "adapter_config.json")
    before = listing(tmp_path)
    ran = run("merge-lora", lost, tmp_path / "out", "--base", home / "base", "--requantize", "same")
    assert (ran.code, listing(tmp_path)) == (3, before) and "no-op" in ran.text
