"""A trainer is named and no role: a language model is the actor that its class says, unless it was a reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import converter

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
TRAINERS = ("trl", "openrlhf", "verl")


def model(folder: Path, **fields: Any) -> Path:
    """A folder like the tiny base with other fields in its config."""
    out = Path(shutil.copytree(FIXTURES / "tiny-qwen2-base", folder))
    config = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | fields))
    return out


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    made = tmp_path_factory.mktemp("families")
    llama = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    gpt2 = GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0)
    LlamaForCausalLM(llama).save_pretrained(made / "llama")
    GPT2LMHeadModel(gpt2).save_pretrained(made / "gpt2")
    return [made / "llama", made / "gpt2", model(made / "qwen2")]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_language_model_is_an_actor_and_that_is_said(trainer: str, families: list[Path]) -> None:
    for folder in families:
        found = converter.verify(folder, for_=trainer)
        assert found.aim.role == "actor"
        assert "role-inferred" in {check.code for check in found.checks}
        assert not {check.code for check in found.failed} & {"head-missing", "backbone-missing", "backbone-unknown"}
        asked = converter.verify(folder, for_=trainer, role="actor")
        assert "role-inferred" not in {check.code for check in asked.checks}


@pytest.mark.parametrize(
    "fields",
    [{"num_labels": 1}, {"id2label": {"0": "LABEL_0"}}, {"problem_type": "regression"}, {"value_head_prefix": "score"}],
    ids=lambda fields: next(iter(fields)),
)
def test_where_the_config_speaks_of_a_head_its_loss_is_a_fault(fields: dict[str, Any], tmp_path: Path) -> None:
    found = converter.verify(model(tmp_path / "lost", **fields), for_="openrlhf")
    assert found.aim.role == "reward"
    assert not found.holds


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_class_with_a_head_is_no_actor_without_it(trainer: str, tmp_path: Path) -> None:
    lost = model(tmp_path / "lost", architectures=["Qwen2ForSequenceClassification"])
    found = converter.verify(lost, for_=trainer)
    assert found.aim.role == "reward"
    assert not found.holds
