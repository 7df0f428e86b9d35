"""`convert`, `rm-to-critic`, `critic-to-rm`: from whatever SRC is to what a trainer loads, in one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import heads_zoo as zoo
from big_headers import llama_70b
from heads_run import config_of, done, refused
from imported import modules_after_each, third_party
from small_models import data_of

SEQCLS = zoo.FORMS["hf-seqcls"]


# The spine


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_transformers_loads_the_critic_of_verl_and_the_reward_model_of_trl_with_every_tensor(
    family: str, tmp_path: Path
) -> None:
    model = zoo.live(family)
    source = zoo.save(zoo.FORMS["openrlhf-old"], model, tmp_path / "rm")
    done("rm-to-critic", source, tmp_path / "critic", "--to", "verl")
    done("critic-to-rm", tmp_path / "critic", tmp_path / "trl", "--to", "trl")
    for out, kind in (
        (tmp_path / "critic", transformers.AutoModelForTokenClassification),
        (tmp_path / "trl", transformers.AutoModelForSequenceClassification),
    ):
        loaded, info = kind.from_pretrained(out, output_loading_info=True, dtype=torch.float64)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            found = loaded.eval()(zoo.IDS).logits
        expected = zoo.expected(model)
        expected = expected if found.dim() == 3 else expected[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_shards_without_the_head_are_the_source_s_byte_by_byte(tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm", shards=4)
    done("rm-to-critic", source, tmp_path / "critic", "--to", "openrlhf@0.5.2", "--layout", "preserve")
    before = {f.name: f.read_bytes() for f in source.glob("*.safetensors")}
    after = {f.name: f.read_bytes() for f in (tmp_path / "critic").glob("*.safetensors")}
    changed = {n for n in before if before[n] != after.get(n)}
    assert before.keys() == after.keys()
    assert [n for n in changed if "score.weight" in load_file(source / n)] == list(changed)
    for name in changed:  # one name in the header, and no data
        assert data_of(source / name) == data_of(tmp_path / "critic" / name)
    index = json.loads((tmp_path / "critic" / "model.safetensors.index.json").read_text())
    assert "value_head.weight" in index["weight_map"]


def test_planning_a_70b_reward_model_imports_no_heavy_library(tmp_path: Path) -> None:
    folder = llama_70b(tmp_path / "rm")
    save_file({"score.weight": torch.ones(1, 8192, dtype=torch.bfloat16)}, folder / "score.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["score.weight"] = "score.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps(config_of(folder) | {"architectures": ["LlamaForSequenceClassification"]})
    )
    rest = ["--dry-run", "--json", "--allow", "lm-head-missing"]
    lines = [["rm-to-critic", str(folder), "--to", to, *rest] for to in ("openrlhf", "verl", "trlx")]
    for modules in modules_after_each(lines):
        assert not third_party(modules) & {"torch", "transformers", "peft", "numpy", "huggingface_hub"}
        assert "converter" in modules


def test_the_screen_says_what_is_read_and_written_and_ends_with_the_launch_line_and_traps(tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm")
    ran = done("rm-to-critic", source, tmp_path / "critic", "--to", "openrlhf")
    assert "reads hf-seqcls: score.weight [1, 16], architectures LlamaForSequenceClassification" in ran.text
    assert "writes a critic for openrlhf 0.11.2 (newest known)" in ran.text
    assert f"--critic.model_name_or_path {tmp_path / 'critic'}" in ran.text
    assert "# the critic's path must differ from the actor's" in ran.text
    receipt = json.loads((tmp_path / "critic" / "rlhf-convert.json").read_text())
    assert {"remap-head": {"to": "openrlhf", "role": "critic"}} in receipt["recipe"]["steps"]


def test_the_two_presets_are_convert_with_a_role(tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm")
    for verb, role in (("rm-to-critic", "critic"), ("critic-to-rm", "reward")):
        preset = done(verb, source, "out", "--to", "openrlhf", "--print-recipe").out
        assert preset == done("convert", source, "out", "--to", "openrlhf", "--role", role, "--print-recipe").out


def test_an_actor_leaves_its_head_behind(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = zoo.save(zoo.FORMS["trl-vhead"], model, tmp_path / "policy", bias=model.bias)
    done("convert", source, tmp_path / "actor", "--to", "verl", "--role", "actor")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "actor", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.lm_head.weight, model.state["lm_head.weight"])
    receipt = json.loads((tmp_path / "actor" / "rlhf-convert.json").read_text())
    assert set(receipt["dropped"]) == {"v_head.summary.weight", "v_head.summary.bias"}


def test_a_refused_bias_ends_with_the_ready_command(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = zoo.save(zoo.FORMS["trl-vhead"], model, tmp_path / "rm", bias=model.bias)
    ran = refused("head-bias", "critic-to-rm", source, tmp_path / "out", "--to", "openrlhf")
    command = f"rlhf-convert critic-to-rm {source} {tmp_path / 'out'} --to openrlhf --bias drop"
    assert ran.err.splitlines()[-1].split() == ["Next:", *command.split()]  # and nothing that a shell would trip over
    done(*command.split()[1:])
    assert "score.bias" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_folder_with_a_value_head_is_sent_to_the_commands_that_see_it(tmp_path: Path) -> None:
    source = zoo.save(zoo.FORMS["trl-vhead"], zoo.live("llama"), tmp_path / "rm")
    shown = done("inspect", source).out.splitlines()
    assert f"Next:    rlhf-convert convert {source} {source}-converted --to trl --role reward" in shown
    ended = done("reshard", source, tmp_path / "same").text
    assert f"rlhf-convert verify {tmp_path / 'same'}" in ended
    assert "from_pretrained" not in ended  # the class in config.json would load without the head, and say nothing


def test_a_printed_recipe_is_a_json_object_where_json_was_asked_for(tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm")
    plain = done("rm-to-critic", source, "out", "--to", "openrlhf", "--print-recipe").out
    found = json.loads(done("rm-to-critic", source, "out", "--to", "openrlhf", "--print-recipe", "--json").out)
    assert found == {"version": 1, "recipe": plain}


# Families and files


def test_a_trainer_that_reads_one_file_gets_one_whatever_the_source_is_in(tmp_path: Path) -> None:
    source = zoo.save(zoo.FORMS["trl-vhead"], zoo.live("llama"), tmp_path / "rm", shards=4)
    done("critic-to-rm", source, tmp_path / "out", "--to", "trl-valuehead")
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    refused("usage", "critic-to-rm", source, tmp_path / "x", "--to", "trl-valuehead", "--layout", "pack", exit_code=2)


@pytest.mark.parametrize(("family", "name"), [("llama", "score"), ("gpt2", "classifier"), ("gpt_neox", "classifier")])
def test_verl_s_head_has_the_name_of_its_family(family: str, name: str, tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live(family), tmp_path / "rm")
    done("rm-to-critic", source, tmp_path / "critic", "--to", "verl")
    found = load_file(tmp_path / "critic" / "model.safetensors")
    assert torch.equal(found[f"{name}.weight"], zoo.live(family).weight)
    assert found[f"{name}.bias"].tolist() == [0.0]


@pytest.mark.parametrize("kind", ["gemma3_text", "opt", "gptj", "olmo2", "jamba"])
def test_a_family_that_verl_has_no_class_for_is_refused_with_trainers_that_have_one(kind: str, tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"model_type": kind}))
    ran = refused("no-class", "rm-to-critic", source, tmp_path / "out", "--to", "verl")
    assert f"no ForTokenClassification for {kind}" in ran.text
    assert "openrlhf" in ran.text


def test_an_encoder_s_reward_model_is_no_linear_head_on_one_token(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    refused("head-not-linear", "rm-to-critic", tmp_path / "bert", tmp_path / "out", "--to", "trl")


def test_torchtune_is_refused_a_family_that_it_does_not_have(tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("gpt2"), tmp_path / "rm")
    assert "llama, mistral" in refused("family", "critic-to-rm", source, tmp_path / "out", "--to", "torchtune").text


# What files don't tell


def test_two_heads_in_one_folder_are_a_question_to_the_user(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = zoo.save(zoo.FORMS["trl-vhead"], model, tmp_path / "rm")
    save_file(
        {"v_head.summary.weight": model.weight * 2, "v_head.summary.bias": model.bias * 0},
        source / "value_head.safetensors",
    )
    save_file(
        load_file(source / "model.safetensors") | {"score.weight": model.weight, "score.bias": model.bias},
        source / "model.safetensors",
    )
    (source / "config.json").write_text(json.dumps(config_of(source) | {"architectures": ["Unknown"]}))
    ran = refused("dialect-ambiguous", "rm-to-critic", source, tmp_path / "out", "--to", "openrlhf", exit_code=2)
    assert "--from hf-tokcls" in ran.text
    assert "--from trl-vhead" in ran.text


def test_a_head_that_no_dialect_has_there_is_a_question_too(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = zoo.save(zoo.Form("{P}", "my_head.weight"), model, tmp_path / "rm")
    two = load_file(source / "model.safetensors")
    save_file(two | {"v_head.weight": two["my_head.weight"].clone()}, source / "model.safetensors", {"format": "pt"})
    ran = refused("dialect-unknown", "rm-to-critic", source, tmp_path / "out", "--to", "openrlhf", exit_code=2)
    assert "v_head.weight" in ran.text


def test_from_names_a_trainer_as_well_as_a_dialect(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = zoo.save(zoo.FORMS["llamafactory"], model, tmp_path / "rm")
    for name in ("llamafactory", "llamafactory@0.9.4"):
        ran = done("rm-to-critic", source, "out", "--to", "openrlhf", "--from", name, "--dry-run")
        assert f"reads llamafactory: --from {name}" in ran.text
    refused("unknown-trainer", "rm-to-critic", source, "out", "--to", "openrlhf", "--from", "nobody", exit_code=2)
    refused("head-missing", "rm-to-critic", source, "out", "--to", "openrlhf", "--from", "safe-rlhf")


def test_a_head_under_the_name_that_config_json_gives_it_is_found(tmp_path: Path) -> None:
    form = zoo.Form("{P}", "my_own.weight", architecture="CriticModel", config=(("value_head_prefix", "my_own"),))
    source = zoo.save(form, zoo.live("llama"), tmp_path / "rm")
    ran = done("rm-to-critic", source, tmp_path / "out", "--to", "openrlhf")
    assert (
        "reads openrlhf: my_own.weight [1, 16], architectures CriticModel, value_head_prefix in config.json" in ran.text
    )
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["score.weight"], zoo.live("llama").weight)
    assert config_of(tmp_path / "out")["value_head_prefix"] == "score"


@pytest.mark.parametrize("option", [("--part", "critic"), ("--tag", "x"), ("--lora-alpha", "8")])
def test_options_that_choose_inside_a_run_say_nothing_of_a_model(option: tuple[str, str], tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm")
    refused("usage", "rm-to-critic", source, tmp_path / "out", "--to", "openrlhf", *option, exit_code=2)


def test_pad_that_is_eos_changes_numbers_where_the_loaders_pool_apart(tmp_path: Path) -> None:
    source = zoo.save(zoo.FORMS["openrlhf"], zoo.live("llama"), tmp_path / "rm")
    assert "pad and EOS" not in done("critic-to-rm", source, "out", "--to", "trl", "--dry-run").text
    (source / "config.json").write_text(json.dumps(config_of(source) | {"pad_token_id": 2}))
    assert "changes-numbers (pad-is-eos)" in done("critic-to-rm", source, "out", "--to", "trl", "--dry-run").text
    assert "pad-is-eos" not in done("critic-to-rm", source, "out", "--to", "openrlhf@0.5.2", "--dry-run").text


@pytest.mark.parametrize(("pooling", "differs"), [("last", False), ("mean", True)])
def test_a_reward_that_is_a_mean_over_tokens_changes_numbers_elsewhere(
    pooling: str, differs: bool, tmp_path: Path
) -> None:
    source = zoo.save(zoo.FORMS["oasst"], zoo.live("gpt_neox"), tmp_path / "rm")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"pooling": pooling}))
    ran = done("critic-to-rm", source, tmp_path / "out", "--to", "trl")
    assert ("changes-numbers (pooling)" in ran.text) is differs
    assert config_of(tmp_path / "out")["model_type"] == "gpt_neox"
    assert "pooling" not in config_of(tmp_path / "out")


def test_a_critic_that_another_trainer_aligns_in_another_way_changes_numbers(tmp_path: Path) -> None:
    source = zoo.save(zoo.FORMS["hf-tokcls"], zoo.live("llama"), tmp_path / "critic")
    assert "changes-numbers (alignment)" in done("convert", source, "out", "--to", "skyrl", "--dry-run").text
    assert "alignment" not in done("convert", source, "out", "--to", "areal", "--dry-run").text


# Recognised and refused


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"regression_layer.weight": (19, 16), "gating.layers.0.weight": (16, 16)}, "a gate computes from the prompt"),
        ({"rm_head.weight": (3, 16), "decoder.layers.0.mlp.linear_fc1.weight": (16, 16)}, ".nemo archives"),
    ],
)
def test_heads_that_nobody_can_convert_are_recognised_and_refused_with_the_reason(
    extra: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    model = zoo.live("llama")
    source = zoo.save(SEQCLS, model, tmp_path / "rm")
    tensors = load_file(source / "model.safetensors")
    tensors.pop("score.weight")
    save_file(tensors | {n: torch.ones(*s) for n, s in extra.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"architectures": ["Special"]}))
    assert says in refused("dialect-refused", "rm-to-critic", source, tmp_path / "out", "--to", "openrlhf").text


@pytest.mark.parametrize("name", ["reward_head.weight", "output_layer.weight", "lm_head.weight"])
def test_heads_that_megatron_s_trainers_name_are_read(name: str, tmp_path: Path) -> None:
    source = zoo.save(SEQCLS, zoo.live("llama"), tmp_path / "rm")
    tensors = load_file(source / "model.safetensors")
    head = tensors.pop("score.weight")
    save_file(tensors | {name: head}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"architectures": ["Special"]}))
    done("rm-to-critic", source, tmp_path / "out", "--to", "openrlhf")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["score.weight"], head)


def test_internlm2_s_backbone_is_its_own_code_s_alone(tmp_path: Path) -> None:
    tensors = {"model.tok_embeddings.weight": torch.ones(8, 16), "v_head.weight": torch.ones(1, 16)}
    source = tmp_path / "rm"
    source.mkdir()
    save_file(tensors | {"model.layers.0.attention.wqkv.weight": torch.ones(16, 16)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "internlm2", "hidden_size": 16}))
    assert "InternLM2" in refused("backbone-code", "rm-to-critic", source, tmp_path / "out", "--to", "openrlhf").text
