"""`convert` and `gather` from every committed training state: what succeeds loads, what is refused says what helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file

from converter.shipped import shipped
from dcp import compare as dcp_compare
from heads_run import done, refused
from places import RUNS
from selected import each_facet
from verl_saves import compare as verl_compare
from zero import compare as zero_compare
from zero.compare import differences

SHIPPED = shipped("fixtures")
UNIVERSAL = RUNS / "zero" / "universal_runs"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),  # dcp.save without ranks
]

# Runs of models that are none of transformers', or whose trainer left no config.json.
NO_CONFIG = [
    "zero/aligned-z1-n2", "zero/bf16-optimizer-z1-n2", "zero/elastic-z2-n3", "zero/odd-z3-n11",
    "zero/plain-named-z0-n1", "zero/roundrobin-z2-n3", "zero/subgroups-z3-n3", "zero/roundrobin-aligned-z2-n3",
    "dcp/fsdp1-n2", "dcp/nested-n4", "dcp/odd-grid-n4", "dcp/odd-n3", "dcp/titan-n3",
]  # fmt: skip
# Adapters are gathered without a config; a model is not merged without one.
NO_CONFIG_OF_BASE = [
    "zero/lora-frozen-head-z3-n2", "zero/lora-z1-n2", "zero/lora-z3-n2", "zero/vision-lora-z2-n2",
]  # fmt: skip
NO_BASE = [
    "zero/lora-lean-z2-n2",
    "dcp/accelerate-adapter-n2",
    "verl_saves/lora-only-fsdp2-n2",
    "zero/vhead-lora-lean-z2-n2",
]
LANGUAGE_MODELS = [
    "zero/lm-fp16-z1-n2", "zero/lm-tied-z3-n2", "zero/neox-z2-n2", "zero/plain-z0-n1", "zero/vision-z2-n2",
    "dcp/accelerate-full-n2", "dcp/accelerate-lora-n2", "dcp/accelerate-n2", "dcp/tp-n4",
    "dcp/frozen-n2", "dcp/fsdp1-hybrid-n4", "dcp/hsdp-n4", "dcp/mixed-n2",
    "verl_saves/actor-bf16-fsdp1-n2", "verl_saves/actor-fsdp1-n1", "verl_saves/actor-original-fsdp1-n2",
    "verl_saves/actor-tied-fsdp1-n2", "verl_saves/actor-tied-fsdp2-n2", "verl_saves/actor-whole-fsdp2-n2",
    "verl_saves/lora-bf16-fsdp2-n2", "verl_saves/lora-fsdp1-n2",
]  # fmt: skip
HEADS_WITHOUT_LM_HEAD = [
    "zero/reward-z2-n2", "zero/dschat-z3-n2", "dcp/accelerate-ranks-n2", "dcp/alone-n1", "dcp/untrained-n2",
    "verl_saves/critic-fsdp1-n3", "verl_saves/critic-fsdp2-n4", "verl_saves/critic-hsdp-fsdp1-n4",
    "verl_saves/critic-hsdp-fsdp2-n4", "verl_saves/lora-critic-frozen-fsdp2-n2", "verl_saves/lora-critic-fsdp2-n2",
]  # fmt: skip
VALUE_HEADS = ["zero/vhead-lora-z2-n2", "zero/vhead-lora-z3-n2", "zero/vhead-z2-n2", "zero/vhead-z3-n2"]
# What `gather`, `convert --to trl --role actor` and `convert --to verl` end with.
EXPECTED = (
    dict.fromkeys(NO_CONFIG, ("config-missing",) * 3)
    | dict.fromkeys(NO_CONFIG_OF_BASE, ("", "config-missing", "config-missing"))
    | dict.fromkeys(NO_BASE, ("", "base-needed", "base-needed"))
    | dict.fromkeys(LANGUAGE_MODELS, ("", "", "head-missing"))
    | dict.fromkeys(HEADS_WITHOUT_LM_HEAD, ("", "lm-head-missing", ""))
    | dict.fromkeys(VALUE_HEADS, ("", "", ""))
    | {
        "zero/ppo-z2-n2": ("several-parts",) * 3,
        # Its class registers buffers of its own, which transformers' has no place for.
        "verl_saves/critic-buffers-fsdp1-n2": ("tensors-unexpected", "lm-head-missing", "tensors-unexpected"),
        "dcp/hf-n2": ("no-shards", "several-checkpoints", "several-checkpoints"),
        "dcp/hf-shards-n2": ("", "lm-head-missing", ""),
    }
)


def _states() -> list[tuple[str, Path]]:
    roots = [zero_compare.RUNS, UNIVERSAL, dcp_compare.RUNS, verl_compare.RUNS, RUNS / "zero" / "wrapped_runs"]
    return [(f"{r.parent.name}/{p.name}", p) for r in roots for p in sorted(r.iterdir())]


def _loaded(out: Path) -> dict[str, torch.Tensor]:
    """The model that transformers loads, with nothing missing and nothing left over."""
    name = json.loads((out / "config.json").read_text())["architectures"][0]
    model, told = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


USUAL = each_facet(
    [(name, folder) for name, folder in _states()],
    lambda state: (state[1].parent, EXPECTED[state[0]]),
    lambda state: (state[1].parent, tuple(state[0].split("-")[-2:])),
    name=lambda state: state[0],
)
"""By default each kind of run with each way to end, and on each number of ranks; tests of sources read all of them."""


@pytest.mark.parametrize(("name", "folder"), USUAL)
def test_every_state_is_converted_into_what_loads_or_refused_with_what_helps(
    name: str, folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "run"))
    verbs = (["gather"], ["convert", "--to", "trl", "--role", "actor"], ["convert", "--to", "verl", "--role", "critic"])
    for number, (words, code) in enumerate(zip(verbs, EXPECTED[name], strict=True)):
        out = tmp_path / f"out-{number}"
        if not code:
            done(words[0], source, out, *words[1:])
            if words != ["gather"] or (name in LANGUAGE_MODELS and not (out / "adapter_config.json").exists()):
                _loaded(out)
            continue
        ran = refused(
            code,
            words[0],
            source,
            out,
            *words[1:],
            exit_code=2 if code in ("several-parts", "no-shards", "several-checkpoints") else 3,
        )
        if code in ("config-missing", "base-needed"):
            assert "the same command with --base and the folder or the Hub name of the base model" in ran.text
            ways = ("for a module of your own, its state dict: rlhf-convert gather ", "rlhf-convert inspect ")
            assert any(way in ran.text for way in ways)
        assert not out.exists()


# A base that the run records


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("tiny-qwen2-base", "tiny-reward-run"):
        shutil.copytree(SHIPPED / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "--to", "trl", "--role", "reward"],
        ["rm-to-critic", "--to", "openrlhf"],
        ["gather", "--emit", "merged"],
    ],
    ids=["convert", "rm-to-critic", "gather"],
)
def test_the_base_that_the_run_records_is_used_where_it_is_at_hand_and_said(words: list[str], shipped: Path) -> None:
    ran = done(words[0], "tiny-reward-run", "recorded", *words[1:])
    assert "tiny-qwen2-base (as recorded)" in ran.text
    done(words[0], "tiny-reward-run", "given", *words[1:], "--base", "tiny-qwen2-base")
    given = {p.name: p.read_bytes() for p in Path("given").iterdir() if p.suffix == ".safetensors"}
    assert given == {p.name: p.read_bytes() for p in Path("recorded").iterdir() if p.suffix == ".safetensors"}
    shutil.rmtree("tiny-qwen2-base")
    ran = refused("base-needed", words[0], "tiny-reward-run", "out", *words[1:])
    assert "the run records tiny-qwen2-base as its base: neither a folder here nor in the Hub's cache" in ran.text
    asked = "the same command with --base and the folder or the Hub name of the base model"
    assert f"{asked} rlhf-convert inspect tiny-reward-run" in ran.text


def test_a_merge_over_the_recorded_base_is_peft_s(shipped: Path) -> None:
    import peft

    done("gather", "tiny-reward-run", "adapter")
    done("convert", "tiny-reward-run", "out", "--to", "trl", "--role", "reward")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        "tiny-qwen2-base", num_labels=1, dtype=torch.float32
    )
    merged = peft.PeftModel.from_pretrained(base, "adapter").merge_and_unload().state_dict()
    found = _loaded(Path("out"))
    assert found.keys() == merged.keys()
    assert all(torch.equal(t, merged[n].bfloat16()) for n, t in found.items())


# Each kind of state, end to end


def test_a_distributed_checkpoint_of_a_reward_model_becomes_openrlhf_s_critic(tmp_path: Path) -> None:
    source = shutil.copytree(dcp_compare.RUNS / "untrained-n2", tmp_path / "run")
    ran = done("rm-to-critic", source, tmp_path / "out", "--to", "openrlhf")
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), dcp_compare.live(source)) == []
    first = next(line for line in ran.out.splitlines() if line.startswith("Next:"))
    step = source / "step-2"
    verify = f"rlhf-convert verify {tmp_path / 'out'} --for openrlhf --role critic --against {step}"
    assert first.split(maxsplit=1)[1] == verify
    done(*verify.split()[1:])


def test_verl_s_critic_becomes_a_value_head_of_trl_with_the_lm_head_of_its_actor(tmp_path: Path) -> None:
    critic = verl_compare.RUNS / "critic-fsdp1-n3"
    step = tmp_path / "run" / "global_step_2"
    shutil.copytree(critic, step / "critic")
    shutil.copytree(verl_compare.RUNS / "actor-fsdp1-n1", step / "actor")
    words = ["convert", tmp_path / "run", tmp_path / "out", "--to", "trl-valuehead", "--role", "critic"]
    ran = refused("several-parts", *words, exit_code=2)
    assert "actor, critic" in ran.text
    command = " ".join(map(str, words)) + " --part critic"
    assert f"rlhf-convert {command}" in ran.text
    refused("lm-head-missing", *command.split())
    done("gather", tmp_path / "run", tmp_path / "actor", "--part", "actor")
    done(*command.split(), "--base", tmp_path / "actor")
    live = verl_compare.live(critic)
    wanted = {n: t for n, t in live.items() if not n.startswith("score.")}
    wanted |= {f"v_head.summary.{x}": live[f"score.{x}"] for x in ("weight", "bias")}
    wanted["lm_head.weight"] = verl_compare.live(verl_compare.RUNS / "actor-fsdp1-n1")["lm_head.weight"]
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), wanted) == []


@pytest.mark.parametrize("name", ["lora-critic-fsdp2-n2", "lora-critic-frozen-fsdp2-n2"])
def test_a_bias_of_zero_under_another_name_in_the_state_is_left_out_for_a_head_without_one(
    name: str, tmp_path: Path
) -> None:
    source = shutil.copytree(verl_compare.RUNS / name, tmp_path / "run")
    done("convert", source, tmp_path / "out", "--to", "openrlhf", "--role", "reward")
    found = load_file(tmp_path / "out" / "model.safetensors")
    done("convert", source, tmp_path / "verl", "--to", "verl", "--role", "critic")
    other = load_file(tmp_path / "verl" / "model.safetensors")
    assert other.pop("score.bias").tolist() == [0.0]
    assert differences(found, other) == []


def test_a_universal_checkpoint_of_a_lora_reward_model_becomes_trl_s(tmp_path: Path) -> None:
    source = Path(shutil.copytree(UNIVERSAL / "lora-z3-n2", tmp_path / "run"))
    refused("config-missing", "convert", source, tmp_path / "out", "--to", "trl", "--role", "reward")
    shutil.copy(zero_compare.RUNS / "lora-z3-n2" / "config-of-run.json", source / "config.json")
    done("convert", source, tmp_path / "out", "--to", "trl", "--role", "reward")
    live, found = zero_compare.live(source), _loaded(tmp_path / "out")
    prefix = "base_model.model."
    assert torch.equal(found["score.weight"], live[f"{prefix}score.modules_to_save.default.weight"])
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (live[f"{prefix}{module}.lora_{x}.default.weight"].float() for x in "AB")
        wanted = live[f"{prefix}{module}.base_layer.weight"].float() + 4 * (b @ a)  # r 2, alpha 8
        assert torch.equal(found[f"{module}.weight"], wanted.bfloat16())


# Wrappers of trainers that do not use DeepSpeed


def _backbone() -> tuple[transformers.LlamaConfig, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    return config, {n: t.clone() for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}


def _saved(folder: Path, config: transformers.LlamaConfig, state: dict[str, torch.Tensor]) -> Path:
    dcp.save({"model": state}, checkpoint_id=folder / "step-1", no_dist=True)
    config.save_pretrained(folder)
    return folder


def test_a_value_head_without_the_wrapper_s_prefix_is_known_too(tmp_path: Path) -> None:
    """So TRL's own state_dict names it, which FSDP saves."""
    config, state = _backbone()
    state |= {"v_head.summary.weight": torch.randn(1, 8), "v_head.summary.bias": torch.randn(1)}
    run = _saved(tmp_path / "run", config, state)
    (run / "value_head.safetensors").touch()  # LLaMA-Factory's mark
    done("gather", run / "step-1", tmp_path / "out")
    head = {n: t for n, t in state.items() if n.startswith("v_head.")}
    assert differences(load_file(tmp_path / "out" / "value_head.safetensors"), head) == []
    assert differences(_loaded(tmp_path / "out"), {n: t for n, t in state.items() if n not in head}) == []


def test_colossalchat_s_model_goes_where_colossalchat_reads_it(tmp_path: Path) -> None:
    config, state = _backbone()
    del state["lm_head.weight"]
    state |= {"value_head.weight": torch.randn(1, 8), "value_head.bias": torch.randn(1)}
    run = _saved(tmp_path / "run", config, state)
    done("gather", run, tmp_path / "out")
    assert differences(load_file(tmp_path / "out" / "modeling" / "model.safetensors"), state) == []
    done("convert", run, tmp_path / "critic", "--to", "verl")
    assert torch.equal(_loaded(tmp_path / "critic")["score.bias"], state["value_head.bias"])


def test_trlx_s_critic_goes_into_the_file_that_trlx_reads(tmp_path: Path) -> None:
    config, state = _backbone()
    state = {f"base_model.{n}": t for n, t in state.items()}
    state |= {"v_head.0.weight": torch.randn(16, 8), "v_head.0.bias": torch.randn(16)}
    state |= {"v_head.2.weight": torch.randn(1, 16), "v_head.2.bias": torch.randn(1)}
    done("gather", _saved(tmp_path / "run", config, state), tmp_path / "out")
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)  # noqa: TID251
    assert differences(found, state) == []


def test_lora_of_deepspeed_chat_s_own_is_refused_and_not_taken_for_weights(tmp_path: Path) -> None:
    config, state = _backbone()
    state |= {"model.layers.0.self_attn.q_proj.lora_right_weight": torch.randn(8, 2)}
    run = _saved(tmp_path / "run", config, state)
    ran = refused("lora-dschat", "gather", run, tmp_path / "out")
    assert "lora_right_weight" in ran.text


# Rounded heads


def test_numbers_of_a_head_are_rounded_as_torch_rounds_them() -> None:
    """ZeRO-3 keeps masters: what a head's bias is in the dtype of training is computed while planning."""
    from converter.converters.heads.read import _rounded
    from converter.core.tensors.dtypes import DType

    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 1, 0x477FF000], dtype=torch.int32)
    numbers = torch.cat([bits, ties, torch.randn(20_000).view(torch.int32)]).view(torch.float32)
    numbers = numbers[~numbers.isnan()]
    for ours, theirs in ((DType.BF16, torch.bfloat16), (DType.F16, torch.float16), (DType.F32, torch.float32)):
        assert [_rounded(v, ours) for v in numbers.tolist()] == numbers.to(theirs).double().tolist()


# Ties


def _saved_twice(folder: Path, change: float) -> dict[str, torch.Tensor]:
    """A tied model saved by torch with both names of the pair, and no record that they are one."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    state = {n: t.clone() for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    state["lm_head.weight"] += change
    dcp.save({"model": state}, checkpoint_id=folder / "step-1", no_dist=True)
    config.save_pretrained(folder)
    return state


def test_a_tied_pair_that_was_stored_twice_is_stored_once_where_both_are_equal(tmp_path: Path) -> None:
    state = _saved_twice(tmp_path / "run", 0.0)
    done("gather", tmp_path / "run", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert differences(_loaded(tmp_path / "out"), state) == []
    receipt: dict[str, Any] = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert receipt["dropped"] == {"lm_head.weight": "identical with model.embed_tokens.weight, to which it is tied"}


def test_a_pair_that_the_config_ties_and_that_differs_is_stored_as_two_and_said_first(tmp_path: Path) -> None:
    state = _saved_twice(tmp_path / "run", 1.0)
    ran = done("gather", tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert differences(_loaded(tmp_path / "out"), state) == []
    notes = [line for line in ran.out.splitlines() if line.startswith("note")]
    assert "changes-numbers (tied-differ)" in notes[0]
