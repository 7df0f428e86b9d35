"""A script's own `checkpoint.pt`, weights and optimizer in one file: what doctor prints of it makes the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from converter.examine.doctor import DoctorRequest, examine
from oracle.command import run

SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS: Mapping[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=20)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=20)),
}
NESTS = ("model", "module", "state_dict", "model_state_dict", "net", "")
CASES = [(f, n) for i, f in enumerate(MODELS) for j, n in enumerate(NESTS) if i == j % 3 or n == "model_state_dict"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, PreTrainedModel, dict[str, Any]]]:
    """Of each family its base, the model after a step, and the state of its optimizer."""
    root, found = tmp_path_factory.mktemp("trained"), {}
    for family, make in MODELS.items():
        torch.manual_seed(3)
        model = make()
        model.save_pretrained(root / family)
        optimizer = torch.optim.AdamW(model.parameters())
        model(input_ids=torch.arange(6)[None]).logits.square().mean().backward()
        optimizer.step()
        found[family] = (root / family, model.eval(), optimizer.state_dict())
    return found


@pytest.mark.parametrize(("family", "nest"), CASES)
def test_the_command_that_doctor_prints_with_a_base_makes_the_model(
    family: str, nest: str, trained: Any, tmp_path: Path
) -> None:
    base, model, optimizer = trained[family]
    state = model.state_dict()
    beside = {"optimizer": optimizer, "rng": torch.get_rng_state(), "step": 7}
    (tmp_path / "run").mkdir()
    torch.save({nest: state, **beside} if nest else state, tmp_path / "run" / "checkpoint.pt")
    report = examine(DoctorRequest(str(tmp_path / "run"), base=str(base)))
    (finding,) = report.findings
    assert finding.code == "weights-alone"
    _, *words = finding.next.words
    assert run(*words).code == 0
    torch.manual_seed(11)
    loaded, info = type(model).from_pretrained(words[2], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_without_a_base_the_tensors_themselves_are_written(trained: Any, tmp_path: Path) -> None:
    _, model, optimizer = trained["llama"]
    torch.save({"model": model.state_dict(), "optimizer": optimizer}, tmp_path / "checkpoint.pt")
    (finding,) = examine(DoctorRequest(str(tmp_path))).findings
    done = run(*finding.next.parts[-1].words[1:])
    assert (done.code, "no model" in done.out) == (0, True)


def test_beside_a_config_no_base_is_needed(trained: Any, tmp_path: Path) -> None:
    base, model, optimizer = trained["llama"]
    shutil.copytree(base, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model": model.state_dict(), "optimizer": optimizer}, tmp_path / "run" / "last.pt")
    found = {f.code: f for f in examine(DoctorRequest(str(tmp_path / "run"))).findings}
    assert run(*found["weights-missing"].next.words[1:]).code == 0


def test_of_several_files_one_has_to_be_named(trained: Any, tmp_path: Path) -> None:
    base, model, optimizer = trained["llama"]
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        torch.save({"model": model.state_dict(), "optimizer": optimizer}, tmp_path / "run" / f"step_{step}.pt")
    torch.save(optimizer, tmp_path / "run" / "adam.pt")
    asked = ("gather", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(base))
    done = run(*asked)
    assert (done.code, "step_1.pt, step_2.pt" in done.err, "adam.pt" in done.err) == (2, True, False)
    assert run(*asked, "--tag", "step_1").code == 0


def test_weights_of_another_model_are_refused(trained: Any, tmp_path: Path) -> None:
    base, _, _ = trained["llama"]
    torch.save({"model": trained["gpt2"][1].state_dict()}, tmp_path / "checkpoint.pt")
    assert run("gather", str(tmp_path), str(tmp_path / "out"), "--base", str(base)).code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["optimizer", "ema_exp_avg", "grads"])
def test_what_is_no_model_s_weights_is_not_taken_for_them(key: str, trained: Any, tmp_path: Path) -> None:
    torch.save({key: trained["llama"][1].state_dict(), "step": 3}, tmp_path / "checkpoint.pt")
    report = examine(DoctorRequest(str(tmp_path)))
    assert [f.code for f in report.findings] == ["pickled-not-weights"]


def test_of_two_models_in_one_file_none_is_chosen(trained: Any, tmp_path: Path) -> None:
    state = trained["llama"][1].state_dict()
    torch.save({"actor": state, "critic": state}, tmp_path / "checkpoint.pt")
    assert [f.code for f in examine(DoctorRequest(str(tmp_path))).findings] == ["pickled-not-weights"]
