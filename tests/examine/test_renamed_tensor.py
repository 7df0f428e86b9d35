"""A tensor under another name beside a sound copy of the model: no command is printed that is refused for the same."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import converter
from converter.cli import main
from converter.errors import Refused

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_printed_of_a_renamed_tensor_is_no_repair_that_refuses_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained("sound")
    shutil.copytree("sound", "it")
    weights = load_file("it/model.safetensors")
    name = next(n for n in sorted(weights) if ".1." in n and n.endswith(".weight"))
    weights[name.replace(".weight", ".wieght")] = weights.pop(name)
    save_file(weights, "it/model.safetensors", metadata={"format": "pt"})
    found = {f.code: f for f in converter.doctor("it").findings}
    assert name in found["tensors-missing"].tensors
    assert "inspect it --tensors" in str(found["tensors-missing"].next)
    assert "repair" not in str(found["tensors-missing"].next)
    with pytest.raises(Refused) as refused:
        converter.repair("it", "fixed", weights_from=["sound"])
    assert refused.value.code == "tensors-missing"
    capsys.readouterr()
    assert main(["repair", "it", "fixed", "--weights-from", "sound"]) == 3
    printed = capsys.readouterr().err.partition("Next:")[2]
    commands = [line.strip() for line in printed.splitlines() if line.strip().startswith("rlhf-convert ")]
    assert [shlex.split(c)[1] for c in commands] == ["inspect"]
    assert main(shlex.split(commands[0])[1:]) == 1  # it lists, and says what is wrong
    assert name.replace(".weight", ".wieght") in capsys.readouterr().out
    assert not Path("fixed").exists()
