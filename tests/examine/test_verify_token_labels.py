"""A model with several labels for each token is a classifier of transformers, and nobody's critic, which has one."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from doctored import SIZES
from oracle.bases import quiet
from oracle.command import merged, run

_PLAIN = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
CLASSES = {
    "Bert": (_PLAIN, "query"),
    "Llama": (SIZES, "q_proj"),
    "DistilBert": ({"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 32}, "q_lin"),
}
WEIGHTS = "model.safetensors"


def trained(folder: Path, name: str, labels: int) -> Path:
    """LoRA over a class for tokens, its base beside it; the merge of both in `merged`."""
    sizes, target = CLASSES[name]
    torch.manual_seed(0)
    with quiet():
        config = getattr(transformers, f"{name}Config")(**sizes, num_labels=labels)
        model = getattr(transformers, f"{name}ForTokenClassification")(config)
        model.save_pretrained(folder / "base")
        lora = peft.LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=[target], init_lora_weights=False)
        peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    merged(folder / "adapter", folder / "merged", "--base", folder / "base")
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_several_labels_are_verified_as_the_class_itself_and_against_the_adapter(name: str, tmp_path: Path) -> None:
    made = trained(tmp_path, name, labels=3)
    ran = run("verify", made / "merged", "--against", made / "adapter", "--base", made / "base")
    assert ran.code == 0, ran.text
    assert f"the head is {name}ForTokenClassification's own, with 3 labels for each token" in ran.text
    assert "verl" not in ran.text


def test_rows_of_the_labels_that_were_exchanged_are_found_against_the_adapter(tmp_path: Path) -> None:
    made = trained(tmp_path, "Bert", labels=3)
    other = Path(shutil.copytree(made / "merged", made / "other"))
    (other / "rlhf-convert.json").unlink()
    held = load_file(other / WEIGHTS)
    save_file(held | {"classifier.weight": held["classifier.weight"].flip(0).contiguous()}, other / WEIGHTS)
    ran = run("verify", other, "--against", made / "adapter", "--base", made / "base")
    assert ran.code == 4 and "classifier.weight" in ran.text
