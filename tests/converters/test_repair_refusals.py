"""What `rlhf-convert repair` refuses: what exists nowhere, and what would be the base model or zeros in disguise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oracle.command import Ran, listing, run
from repair.live import PREFIX, as_adapter, copied, drop_shards, live, rewrite

EMBED = "model.embed_tokens.weight"
SMALL = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "kv"]
NORMS = [f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")] + ["model.norm.weight"]


def _refused(code: str, src: Path, *options: object) -> Ran:
    """The run, which must refuse with this code and leave everything as it was."""
    root = src.parent.parent
    before = listing(root)
    done = run("repair", src, root / "out", *options)
    assert done.code == 3, done.out
    assert f"REFUSED {code}: nothing written" in done.err
    assert listing(root) == before
    return done


def test_trained_lora_without_shards_is_lost_and_the_refusal_says_what_helps(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora", shards=False) / "checkpoint-2"
    done = _refused("tensors-lost", src, "--base", src.parent / "base")
    assert "6 of 6 lost tensors" in done.text
    assert "4 x trained by LoRA" in done.text
    assert f"rlhf-convert inspect {src} --tensors # lists every tensor that is there; --weights-from names" in done.text
    assert "no shards of a trainer" in done.text


@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_half_of_a_lora_is_lost_like_the_whole(tmp_path: Path, kind: str) -> None:
    src = copied(tmp_path, "lora", shards=False) / "checkpoint-2"
    held = as_adapter(live("lora"))
    rewrite(src / "adapter_model.safetensors", put=held, empty=[n for n in held if kind in n])
    assert "2 of 2 lost tensors" in _refused("tensors-lost", src).text


def test_embeddings_that_were_trained_are_not_filled_from_the_base(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora", shards=False) / "checkpoint-2"
    held = as_adapter(live("lora"))
    rewrite(src / "adapter_model.safetensors", put=held, empty=[f"{PREFIX}{EMBED}"])
    done = _refused("tensors-lost", src, "--base", src.parent / "base")
    assert "modules_to_save" in done.err


@pytest.mark.parametrize("name", ["head-lean", "head-frozen-lean"])
def test_a_random_frozen_head_that_no_file_holds_is_lost(tmp_path: Path, name: str) -> None:
    src = copied(tmp_path, name) / "checkpoint-2"
    assert "saved without frozen parameters" in _refused("head-base-lost", src).text


def test_a_whole_adapter_over_a_lost_head_is_no_healthy_one(tmp_path: Path) -> None:
    src = copied(tmp_path, "head", shards=False) / "checkpoint-2"
    rewrite(src / "adapter_model.safetensors", put=as_adapter(live("head")))
    _refused("head-base-lost", src)


def test_a_trained_matrix_is_not_filled_from_the_base_though_every_norm_equals_it(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen-lean", shards=False) / "checkpoint-2"
    base = src.parent / "base"
    held = load_file(base / "model.safetensors")
    rewrite(src / "model.safetensors", put={n: held[n] for n in (*NORMS, *SMALL)})
    done = _refused("tensors-lost", src, "--base", base)
    assert "nothing proves that it was frozen" in done.text


def test_the_base_given_as_a_place_for_weights_is_not_taken_for_a_copy(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen-lean", shards=False) / "checkpoint-2"
    base = src.parent / "base"
    held = load_file(base / "model.safetensors")
    rewrite(src / "model.safetensors", put={n: held[n] for n in (*NORMS, *SMALL)})
    for given in ([], ["--base", base]):
        done = _refused("tensors-lost", src, "--weights-from", base, *given)
        assert "may be the base model" in done.text


def test_a_stale_file_with_equal_norms_is_not_taken_for_the_same_model(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen-lean", shards=False) / "checkpoint-2"
    held = load_file(src.parent / "base" / "model.safetensors")
    rewrite(src / "model.safetensors", put={n: held[n] for n in (*NORMS, *SMALL)})
    torch.save(held, src / "pytorch_model.bin")
    assert "may be the base model" in _refused("tensors-lost", src).text


def test_a_copy_with_other_values_is_none(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward", shards=False) / "checkpoint-2"
    other = Path(shutil.copytree(src, tmp_path / "backup"))
    rewrite(other / "model.safetensors", put=live("reward", 1))
    assert "not a copy: 6 of 6 tensors" in _refused("tensors-lost", src, "--weights-from", other).text


def test_an_adapter_whose_every_lora_b_is_zero_is_not_presented_as_repaired(tmp_path: Path) -> None:
    src = copied(tmp_path, "embed-lora", shards=False) / "checkpoint-2"
    held = as_adapter(live("embed-lora"))
    zeros = {n: torch.zeros_like(t) for n, t in held.items() if "_B" in n}
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    rewrite(src / "adapter_model.safetensors", put=held | zeros, drop=[key])
    _refused("adapter-untrained", src)


def test_shards_of_one_step_with_other_values_are_of_another_model(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward") / "checkpoint-2"
    shutil.rmtree(src / "global_step2")
    shutil.copytree(src.parent / "checkpoint-1" / "global_step1", src / "global_step2")
    shutil.rmtree(src.parent / "checkpoint-1")
    assert "at one step" in _refused("repair-mismatch", src, "--allow", "older-weights").text


def test_shards_of_another_architecture_are_refused(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora", shards=False) / "checkpoint-2"
    other = copied(tmp_path, "reward")
    assert "its run trained no LoRA" in _refused("repair-mismatch", src, "--weights-from", other / "checkpoint-2").text


def test_a_missing_rank_of_stage_3_loses_everything_and_is_named(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora") / "checkpoint-2"
    shutil.rmtree(src.parent / "checkpoint-1")
    next(src.glob("global_step2/*rank_1*optim_states.pt")).unlink()
    assert "zero-rank-missing" in _refused("tensors-lost", src).text
    _refused("zero-rank-missing", src, "--weights-from", src / "global_step2")


def test_two_states_that_may_both_be_of_the_step_are_a_question(tmp_path: Path) -> None:
    run_folder = copied(tmp_path, "lora")
    src = run_folder / "final"
    src.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run_folder / "checkpoint-2" / file, src)
    done = _refused("step-unknown", src)
    assert f"{run_folder}/checkpoint-1/global_step1" in done.text


def test_a_merged_model_is_not_filled_with_weights_from_before_the_merge(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward", shards=False) / "checkpoint-2"
    held = {n.replace(".base_layer", "").removeprefix(PREFIX): t for n, t in live("head").items()}
    q = "model.layers.0.self_attn.q_proj.weight"
    rewrite(src / "model.safetensors", put={n: t for n, t in held.items() if ".lora_" not in n}, empty=[q])
    done = _refused("tensors-lost", src, "--weights-from", copied(tmp_path, "head") / "checkpoint-2")
    assert "whether it was merged" in done.text


def test_a_reward_model_without_its_head_is_no_healthy_one(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward", shards=False) / "checkpoint-2"
    rewrite(src / "model.safetensors", put=live("reward"), drop=["score.weight"])
    assert "1 x the head: no base model has it" in _refused("tensors-lost", src).text


def test_a_file_that_is_whole_is_called_healthy_and_the_loader_is_named(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen-z1") / "checkpoint-2"
    before = listing(tmp_path)
    done = run("repair", src, tmp_path / "out")
    assert done.code == 0
    assert "nothing to repair" in done.out and "runs under ZeRO-3" in done.out
    told = json.loads(run("repair", src, tmp_path / "out", "--json").out)
    assert told["healthy"] is True
    assert listing(tmp_path) == before


@pytest.mark.parametrize(("verb", "name"), [("merge-lora", "lora"), ("reshard", "reward")])
def test_other_verbs_refuse_and_name_the_command_that_repairs(tmp_path: Path, verb: str, name: str) -> None:
    src = copied(tmp_path, name) / "checkpoint-2"
    base = ["--base", src.parent / "base"] if verb == "merge-lora" else []
    done = run(verb, src, tmp_path / "out", *base)
    assert (done.code, (tmp_path / "out").exists()) == (3, False)
    assert f"Next: rlhf-convert repair {src} {tmp_path / 'out'}" in done.text
    assert "--weights-from" not in done.text  # its shards lie in the folder, and are found
    drop_shards(src.parent)
    done = run(verb, src, tmp_path / "out", *base)
    assert "--weights-from and a folder of the same run that still holds them" in done.text
    assert f"rlhf-convert doctor {src} # shows all that is wrong there" in done.text


def test_a_place_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora") / "checkpoint-2"
    done = run("repair", src, tmp_path / "out", "--weights-from", tmp_path / "nowhere")
    assert (done.code, "path-missing" in done.err) == (3, True)


def test_the_whole_twin_of_an_empty_adapter_still_needs_its_head(tmp_path: Path) -> None:
    src = copied(tmp_path, "head", shards=False) / "checkpoint-2"
    torch.save(as_adapter(live("head")), src / "adapter_model.bin")
    _refused("head-base-lost", src)


def test_the_head_of_another_run_is_not_taken(tmp_path: Path) -> None:
    src = copied(tmp_path, "head", shards=False) / "checkpoint-2"
    held = as_adapter(live("head"))
    rewrite(src / "adapter_model.safetensors", put={n: t + 1 for n, t in held.items()})
    other = copied(tmp_path / "elsewhere", "head") / "checkpoint-2" / "global_step2"
    _refused("head-base-lost", src.rename(src.parent / "final"), "--weights-from", other, "--allow", "older-weights")
