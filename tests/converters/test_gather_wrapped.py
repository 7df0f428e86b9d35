"""Training states of models inside a trainer's wrapper: bit-equal to what lived, laid out as the trainer saves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from heads_run import done, refused
from places import RUNS
from zero import compare
from zero.compare import differences, evaluated, state_faults

WRAPPED = RUNS / "zero" / "wrapped_runs"
INNER = "pretrained_model."
PEFT = "pretrained_model.base_model.model."
HEAD = {"v_head.summary.weight", "v_head.summary.bias"}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _copy(name: str, to: Path, *, trainer: str = "trl") -> Path:
    """A run as its trainer leaves it; LLaMA-Factory keeps a log in the run's folder."""
    if trainer == "trl":
        return Path(shutil.copytree(WRAPPED / name, to / name))
    run = to / "run"
    shutil.copytree(WRAPPED / name, run / "checkpoint-2")
    (run / "trainer_log.jsonl").write_text('{"current_steps": 2, "total_steps": 2, "loss": 0.1}\n')
    return run


def _live(name: str) -> dict[str, torch.Tensor]:
    return compare.live(WRAPPED / name)


def _head(name: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in _live(name).items() if n in HEAD}


def _whole(name: str) -> dict[str, torch.Tensor]:
    """The model inside, without LoRA."""
    return {n.removeprefix(INNER): t for n, t in _live(name).items() if n not in HEAD}


def _merged(name: str) -> dict[str, torch.Tensor]:
    """W + 4 BA in fp32 and rounded once, under the names of the model inside: r is 2, alpha 8."""
    held, found = _live(name), {}
    for raw, tensor in held.items():
        if raw in HEAD or ".lora_" in raw:
            continue
        if ".base_layer." in raw:
            a, b = (held[raw.replace("base_layer", f"lora_{x}.default")].float() for x in "AB")
            tensor = (tensor.float() + 4 * (b @ a)).to(tensor.dtype)
        found[raw.removeprefix(PEFT).replace(".base_layer", "")] = tensor
    return found


def _adapter(name: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(INNER).replace(".default", ""): t for n, t in _live(name).items() if ".lora_" in n}


@pytest.mark.parametrize("name", compare.run_names(WRAPPED))
def test_every_tensor_master_and_moment_is_that_which_lived_under_its_parameter_s_name(name: str) -> None:
    """TRL's wrapper has a state_dict of its own: without its prefix, and of a LoRA model the head alone."""
    run = WRAPPED / name
    checkpoint = compare.source_of(run).open(run, asked=name)
    wanted = compare.live(run)
    if "lean" in name:  # frozen parameters were excluded when it was saved
        wanted = {n: t for n, t in wanted.items() if n in (checkpoint.trained or ())}
        assert len(wanted) == 6
    assert differences(evaluated(checkpoint.tensors), wanted) == []
    assert [d for kind in compare.STATES for d in state_faults(run, checkpoint, kind)] == []


@pytest.mark.parametrize("name", ["vhead-z2-n2", "vhead-z3-n2"])
def test_trl_s_wrapper_becomes_one_file_with_the_head_inside(name: str, tmp_path: Path) -> None:
    done("gather", _copy(name, tmp_path), tmp_path / "out")
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), _whole(name) | _head(name)) == []
    done("verify", tmp_path / "out", "--for", "trl-valuehead", "--role", "critic")


@pytest.mark.parametrize("name", ["vhead-z2-n2", "vhead-z3-n2"])
def test_llama_factory_s_run_becomes_a_model_and_value_head_safetensors(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = done("gather", _copy(name, tmp_path, trainer="llamafactory"), out)
    assert "as LLaMA-Factory saves it: the head in value_head.safetensors (trainer_log.jsonl is there)" in ran.text
    assert differences(load_file(out / "value_head.safetensors"), _head(name)) == []
    model, told = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert differences(model.state_dict(), _whole(name)) == []


@pytest.mark.parametrize("name", ["vhead-lora-z2-n2", "vhead-lora-z3-n2", "vhead-lora-lean-z2-n2"])
def test_lora_below_the_wrapper_becomes_an_adapter_with_the_head_in_the_trainer_s_file(
    name: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    done("gather", _copy(name, tmp_path), tmp_path / "trl")
    done("gather", _copy(name, tmp_path, trainer="llamafactory"), tmp_path / "lf")
    heads = [
        torch.load(tmp_path / "trl" / "pytorch_model.bin", weights_only=True),  # noqa: TID251
        load_file(tmp_path / "lf" / "value_head.safetensors"),
    ]
    for out, head in zip((tmp_path / "trl", tmp_path / "lf"), heads, strict=True):
        assert differences(head, _head(name)) == []
        assert differences(load_file(out / "adapter_model.safetensors"), _adapter(name)) == []
    config = transformers.LlamaConfig.from_pretrained(WRAPPED / name)
    loaded = PeftModel.from_pretrained(transformers.LlamaForCausalLM(config).bfloat16(), tmp_path / "lf")
    # PEFT loads adapters in fp32, which holds every number of bf16.
    found = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if ".lora_" in n}
    assert {n: p.to(torch.bfloat16).tolist() for n, p in found.items()} == {
        n: t.tolist() for n, t in _adapter(name).items()
    }


@pytest.mark.parametrize("name", ["vhead-lora-z2-n2", "vhead-lora-z3-n2"])
@pytest.mark.parametrize("trainer", ["trl", "llamafactory"])
def test_a_wrapped_lora_run_is_converted_in_one_pass(name: str, trainer: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = _copy(name, tmp_path, trainer=trainer)
    refused("head-bias", "convert", run, out, "--to", "openrlhf", "--role", "reward")
    done("convert", run, out, "--to", "openrlhf", "--role", "reward", "--bias", "drop")
    wanted = {n: t for n, t in _merged(name).items() if n != "lm_head.weight"}
    wanted["score.weight"] = _live(name)["v_head.summary.weight"]
    assert differences(load_file(out / "model.safetensors"), wanted) == []
    done("convert", run, tmp_path / "critic", "--to", "verl", "--role", "critic")
    model, told = transformers.LlamaForTokenClassification.from_pretrained(
        tmp_path / "critic", output_loading_info=True
    )
    assert not any(told.values()), told
    assert torch.equal(model.score.bias, _live(name)["v_head.summary.bias"])


def test_a_run_saved_without_its_base_is_merged_over_the_one_given(tmp_path: Path) -> None:
    name, run = "vhead-lora-lean-z2-n2", _copy("vhead-lora-lean-z2-n2", tmp_path)
    ran = refused("base-needed", "rm-to-critic", run, tmp_path / "out", "--to", "trl-valuehead")
    assert "the same command with --base and the folder or the Hub name of the base model" in ran.text
    frozen = {n.removeprefix(PEFT).replace(".base_layer", ""): t for n, t in _live(name).items() if ".lora_" not in n}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(run)).bfloat16()
    model.load_state_dict({n: t for n, t in frozen.items() if n not in HEAD})
    model.save_pretrained(tmp_path / "base")
    done("rm-to-critic", run, tmp_path / "out", "--to", "trl-valuehead", "--base", tmp_path / "base")
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), _merged(name) | _head(name)) == []


def test_policy_and_value_model_of_ppo_are_told_apart_by_part(tmp_path: Path) -> None:
    name = "ppo-z2-n2"
    run = _copy(name, tmp_path)
    ran = refused("several-parts", "gather", run, tmp_path / "x", exit_code=2)
    assert "--part policy or --part value" in ran.text
    ran = refused("several-parts", "convert", run, tmp_path / "x", "--to", "verl", "--role", "critic", exit_code=2)
    assert f"rlhf-convert convert {run} {tmp_path / 'x'} --to verl --role critic --part value" in ran.text
    for part, prefix, kind in (
        ("policy", "policy.", transformers.LlamaForCausalLM),
        ("value", "value_model.", transformers.LlamaForSequenceClassification),
    ):
        done("gather", run, tmp_path / part, "--part", part)
        model, told = kind.from_pretrained(tmp_path / part, output_loading_info=True)
        assert not any(told.values()), told
        live = {n.removeprefix(prefix): t for n, t in _live(name).items() if n.startswith(prefix)}
        assert differences(model.state_dict(), live) == []
    assert json.loads((tmp_path / "value" / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}
    done("convert", run, tmp_path / "critic", "--to", "openrlhf", "--role", "critic", "--part", "value")
    score = load_file(tmp_path / "critic" / "model.safetensors")["score.weight"]
    assert torch.equal(score, _live(name)["value_model.score.weight"])


def test_a_value_model_of_other_sizes_than_the_policy_needs_its_own_base(tmp_path: Path) -> None:
    run = _copy("ppo-z2-n2", tmp_path)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    ran = refused("config-of-policy", "gather", run, tmp_path / "out", "--part", "value")
    assert "the same command with --base and the folder or the Hub name" in ran.text


def test_a_part_of_a_state_that_has_none_is_refused_with_the_command_without_it(tmp_path: Path) -> None:
    run = _copy("vhead-z2-n2", tmp_path)
    ran = refused("no-parts", "gather", run, tmp_path / "out", "--part", "value", exit_code=2)
    assert ran.text.rstrip().endswith(f"rlhf-convert gather {run} {tmp_path / 'out'}")


def test_deepspeed_chat_s_reward_model_keeps_its_names_in_pytorch_model_bin(tmp_path: Path) -> None:
    name = "dschat-z3-n2"
    run = _copy(name, tmp_path)
    done("gather", run, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.bin*")) == ["pytorch_model.bin"]
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)  # noqa: TID251
    assert differences(found, _live(name)) == []
    done("convert", run, tmp_path / "rm", "--to", "trl", "--role", "reward")
    model, told = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not any(told.values()), told
    assert torch.equal(model.score.weight, _live(name)["v_head.weight"])
