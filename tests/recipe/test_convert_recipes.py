"""The shipped recipes for the common roads do what the verbs do, each on a model of its source."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import heads_zoo as zoo
from heads_run import base_of
from oracle.command import run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


@pytest.mark.parametrize(
    ("recipe", "source", "head"),
    [
        ("llamafactory-rm-to-openrlhf", "llamafactory", "openrlhf"),
        ("trl-rm-to-verl-critic", "hf-seqcls", "hf-tokcls"),
        ("deepspeed-chat-rm-to-trl", "dschat", "hf-seqcls"),
        ("public-rm-to-verl-critic", "ultrarm", "hf-tokcls"),
        ("public-rm-to-verl-critic", "grm", "hf-tokcls"),
    ],
)
def test_a_shipped_recipe_gives_the_source_s_values(recipe: str, source: str, head: str, tmp_path: Path) -> None:
    model = zoo.live("llama")
    given = zoo.save(zoo.FORMS[source], model, tmp_path / "rm")
    ran = run("run", recipe, tmp_path / "out", "--input", f"source={given}")
    assert ran.code == 0, ran.err
    found = zoo.score("llama", tmp_path / "out", zoo.FORMS[head])
    torch.testing.assert_close(found, zoo.expected(model), rtol=1e-12, atol=1e-12)


def test_the_recipe_for_a_lora_reward_model_merges_and_remaps_in_one_pass(tmp_path: Path) -> None:
    base = base_of(zoo.live("llama"), tmp_path / "base")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False)
    trained = peft.get_peft_model(model, lora)
    trained.save_pretrained(tmp_path / "adapter")
    out, name = tmp_path / "critic", "openrlhf-lora-rm-to-openrlhf-critic"
    given = ("--input", f"adapter={tmp_path / 'adapter'}", "--input", f"source={base}")
    ran = run("run", name, out, "--dtype", "fp32", *given)
    assert ran.code == 0, ran.err
    merged = trained.merge_and_unload()
    found = load_file(out / "model.safetensors")
    expected = {n: t for n, t in merged.state_dict().items() if n in found}
    assert len(expected) == len(found) == 21
    for tensor, wanted in ((found[n], expected[n]) for n in found):
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)
