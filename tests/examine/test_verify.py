"""`verify` tells a folder that a trainer loads from one that would start with a random head, or that says otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

from converter.cli import main
from converter.dialects.known import trainers
from verify_folders import SHAPE, WEIGHT, codes, copy, make_rm, randomised, rewrite, text_of, verify


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that transformers saved."""
    return make_rm(tmp_path_factory.mktemp("rm") / "rm")


# Against the dialect


def test_a_language_model_is_no_reward_model_that_lost_its_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(tmp_path / "sft")
    code, found = verify(capsys, str(tmp_path / "sft"))
    assert (code, found["role"], found["verified"]) == (0, "actor", True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
def test_a_causal_adapter_is_sent_to_merge_lora_and_a_reward_adapter_to_convert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    code, found = verify(capsys, str(tmp_path / "a"))
    assert (code, found["next"]) == (4, [f"rlhf-convert merge-lora {tmp_path / 'a'} {tmp_path / 'a'}-merged"])
    code, found = verify(capsys, str(tmp_path / "a"), "--for", "trl")
    assert (code, found["next"]) == (
        4,
        [f"rlhf-convert convert {tmp_path / 'a'} {tmp_path / 'a'}-converted --to trl --role reward"],
    )


@pytest.mark.parametrize(("trainer", "knows"), [("trl", True), ("vllm", False), ("transformers", False)])
def test_traps_of_one_trainer_are_not_told_to_users_of_another(
    rm: Path, capsys: pytest.CaptureFixture[str], trainer: str, knows: bool
) -> None:
    code, found = verify(capsys, str(rm), "--for", trainer, "--role", "reward")
    assert code == 0
    assert any("TRL" in line for line in found["next"]) is knows


def test_a_folder_that_the_trainer_reads_is_verified_with_its_launch_line(
    rm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = verify(capsys, str(rm), "--for", "trl", "--role", "reward")
    assert (code, found["verified"], codes(found)) == (0, True, set())
    assert any(str(rm) in line for line in found["next"])


def test_a_head_under_another_name_fails_and_the_command_that_is_printed_fixes_it(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = copy(rm, tmp_path / "old", architectures=["RewardModel"])
    rewrite(old, lambda t: t.update({"value_head.weight": t.pop("score.weight")}))
    code, found = verify(capsys, str(old), "--for", "openrlhf", "--role", "critic")
    assert code == 4
    assert "head-missing" in codes(found)
    assert "random" in text_of(found, "head-missing")
    (command,) = found["next"]
    out = f"{old}-converted"
    assert main(command.split()[1:]) == 0
    capsys.readouterr()
    assert verify(capsys, out, "--for", "openrlhf", "--role", "critic", "--against", str(old))[0] == 0


def test_an_empty_tensor_fails_before_any_trainer_says_size_mismatch(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copy(rm, tmp_path / "broken")
    rewrite(broken, lambda t: t.update({WEIGHT: torch.empty(0)}))
    code, found = verify(capsys, str(broken), "--for", "openrlhf")
    assert (code, codes(found)) == (4, {"zero3-empty-tensors"})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t.pop(WEIGHT), "backbone-missing"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[WEIGHT].flip(0).contiguous()}), "backbone-unknown"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}), "backbone-shape"),
        (lambda t: t.update({"score.weight": t["score.weight"].repeat(2, 1)}), "head-rows"),
        (lambda t: t.update({"score.weight": t["score.weight"][:, :8].clone()}), "head-shape"),
        (lambda t: t.update({"score.weight": t["score.weight"] * math.nan}), "nonfinite"),
        (lambda t: t.update({"score.bias": torch.tensor([0.5])}), "head-bias"),
    ],
)
def test_what_a_loader_would_refuse_or_fill_with_random_numbers_fails_by_its_code(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, code: str
) -> None:
    wrong = copy(rm, tmp_path / "wrong")
    rewrite(wrong, change)
    exit_code, found = verify(capsys, str(wrong), "--for", "openrlhf", "--role", "reward")
    assert (exit_code, codes(found)) == (4, {code})


def test_a_bias_that_the_loader_ignores_is_told_as_a_shift_of_every_score(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biased = copy(rm, tmp_path / "biased")
    rewrite(biased, lambda t: t.update({"score.bias": torch.tensor([0.5])}))
    assert "shifts by -0.5" in text_of(verify(capsys, str(biased), "--for", "trl", "--role", "reward")[1], "head-bias")


@pytest.mark.parametrize(
    ("trainer", "role", "config", "code"),
    [
        ("trl", "reward", {"pad_token_id": None}, "pad-token-missing"),
        ("ms-swift", "reward", {"architectures": ["RewardModel"]}, "architectures"),
        ("ms-swift", "reward", {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, "labels"),
        ("skyrl", "critic", {"value_head_prefix": "score"}, "config-key"),
    ],
)
def test_a_config_that_a_loader_goes_by_wrongly_fails(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: str, role: str, config: Any, code: str
) -> None:
    wrong = copy(rm, tmp_path / "wrong", **config)
    exit_code, found = verify(capsys, str(wrong), "--for", trainer, "--role", role)
    assert exit_code == 4
    assert code in codes(found)


@pytest.mark.parametrize(("trainer", "role"), [("trl", "reward"), ("roll", "reward")])
def test_labels_do_not_matter_to_a_trainer_that_loads_with_one_whatever_the_config_says(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: str, role: str
) -> None:
    two = copy(rm, tmp_path / "two", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}, num_labels=2)
    assert "labels" not in codes(verify(capsys, str(two), "--for", trainer, "--role", role)[1])


def test_pad_equal_to_eos_is_told_and_is_no_failure(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = verify(capsys, str(copy(rm, tmp_path / "pad", pad_token_id=2)), "--for", "trl", "--role", "reward")
    assert (code, "pad-is-eos" in codes(found, "note")) == (0, True)


def test_a_sharded_folder_fails_for_a_wrapper_that_reads_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sharded"
    randomised(LlamaForCausalLM(LlamaConfig(**SHAPE))).save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    last = max(index["weight_map"].values())
    tensors = load_file(folder / last) | {
        "v_head.summary.weight": torch.randn(1, 16),
        "v_head.summary.bias": torch.zeros(1),
    }
    save_file(tensors, folder / last, metadata={"format": "pt"})
    index["weight_map"] |= {"v_head.summary.weight": last, "v_head.summary.bias": last}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, found = verify(capsys, str(folder), "--for", "trl-valuehead@0.28", "--role", "critic")
    assert (code, codes(found)) == (4, {"sharded"})


def test_a_family_without_a_token_classifier_fails_for_verl(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma = copy(rm, tmp_path / "gemma", model_type="gemma3_text", architectures=["Gemma3ForSequenceClassification"])
    code, found = verify(capsys, str(gemma), "--for", "verl", "--role", "critic")
    assert (code, "no-class" in codes(found)) == (4, True)


# Against a source


def test_a_converted_critic_says_what_the_reward_model_said(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "critic")
    assert main(["convert", str(rm), out, "--to", "verl", "--role", "critic", "-q"]) == 0
    capsys.readouterr()
    code, found = verify(capsys, out, "--for", "verl", "--against", str(rm))
    texts = " ".join(c["text"] for c in found["checks"])
    assert code == 0
    assert "20 of 20 backbone tensors bit-equal" in texts
    assert "differ by 0 at most" in texts


def test_one_changed_weight_is_named_with_its_difference(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy(rm, tmp_path / "changed")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[WEIGHT][3, 5] += 0.25

    rewrite(changed, change)
    code, found = verify(capsys, str(changed), "--for", "trl", "--role", "reward", "--against", str(rm))
    told = text_of(found, "tensors-differ")
    assert (code, "up to 0.25" in told, WEIGHT in told) == (4, True, True)


def test_a_cast_is_told_as_one_rounding(rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = copy(rm, tmp_path / "half")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n != "score.weight"]:
            tensors[name] = tensors[name].bfloat16()

    rewrite(half, change)
    code, found = verify(capsys, str(half), "--for", "trl", "--role", "reward", "--against", str(rm))
    texts = " ".join(c["text"] for c in found["checks"])
    assert (code, "20 rounded once to another dtype" in texts) == (0, True)


def test_a_dropped_bias_is_told_as_the_constant_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = randomised(LlamaForTokenClassification(LlamaConfig(num_labels=1, **SHAPE)))
    with torch.no_grad():
        model.score.bias.fill_(0.75)
    model.save_pretrained(tmp_path / "biased")
    out = str(tmp_path / "out")
    asked = ["convert", str(tmp_path / "biased"), out, "--to", "trl", "--role", "reward", "-q"]
    assert main(asked) == 3
    assert main([*asked, "--bias", "drop"]) == 0
    capsys.readouterr()
    code, found = verify(capsys, out, "--for", "trl", "--against", str(tmp_path / "biased"))
    assert (code, "shift by -0.75" in text_of(found, "head-shifted")) == (4, True)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_what_peft_merged_is_the_adapter_over_its_base(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = LlamaForSequenceClassification.from_pretrained(rm, num_labels=1)
    adapted = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    asked = [str(tmp_path / "merged"), "--for", "trl", "--role", "reward", "--against", str(tmp_path / "adapter")]
    code, found = verify(capsys, *asked, "--base", str(rm))
    assert (code, codes(found)) == (0, set())
    assert "4 within rounding" in " ".join(c["text"] for c in found["checks"])
    assert verify(capsys, str(rm), *asked[1:], "--base", str(rm))[0] == 4


# The receipt


def test_a_receipt_that_counts_other_tensors_than_there_are_fails(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "critic"
    assert main(["convert", str(rm), str(out), "--to", "verl", "--role", "critic", "-q"]) == 0
    rewrite(out, lambda t: t.pop(WEIGHT))
    capsys.readouterr()
    assert "receipt-differs" in codes(verify(capsys, str(out), "--for", "verl")[1])


def test_a_source_that_the_receipt_does_not_name_is_told(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "critic", copy(rm, tmp_path / "other")
    rewrite(other, lambda t: t.update({"score.weight": t["score.weight"].repeat(2, 1)[:1].double()}))
    assert main(["convert", str(rm), str(out), "--to", "verl", "--role", "critic", "-q"]) == 0
    capsys.readouterr()
    assert "source-differs" not in codes(verify(capsys, str(out), "--for", "verl", "--against", str(rm))[1], "note")
    assert "source-differs" in codes(verify(capsys, str(out), "--for", "verl", "--against", str(other))[1], "note")


# The command line


@pytest.mark.parametrize("wrong", [["--live"], ["--python", "python"], ["--base", "x"]])
def test_flags_that_need_another_are_usage_errors(
    rm: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(rm), "--for", "trl", *wrong]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("role", ["reward", "critic", "actor"])
def test_what_is_written_for_any_trainer_is_verified_for_it(
    rm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], role: Any
) -> None:
    base = tmp_path / "base"
    randomised(LlamaForCausalLM(LlamaConfig(**SHAPE))).save_pretrained(base)
    source = str(base if role == "actor" else rm)
    verified = []
    for trainer in trainers(role):
        out = str(tmp_path / trainer)
        if main(["convert", source, out, "--to", trainer, "--role", role, "--base", str(base), "-q"]):
            assert "trainer-unusable" in capsys.readouterr().err
            continue
        capsys.readouterr()
        code, found = verify(capsys, out, "--for", trainer, "--role", role, "--against", source)
        assert code == 0, (trainer, found["checks"])
        verified.append(trainer)
    assert len(verified) >= 14
