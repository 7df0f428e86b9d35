"""`rlhf-convert repair` row by row of the table of what saves an empty tensor: bit-equal to what lived in training.

The broken folders are what `save_pretrained` wrote under real DeepSpeed, without gathering.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracle.command import listing, run
from places import RUNS
from repair.live import PREFIX, as_adapter, copied, drop_shards, live, receipt, rewrite, saved
from zero.compare import differences
from zero.compare import live as zero_live

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
VERL, DCP, UNIVERSAL = RUNS / "verl_saves" / "runs", RUNS / "dcp" / "runs", RUNS / "zero" / "universal_runs"
EMBED = "model.embed_tokens.weight"


def _repaired(src: Path, *options: object) -> Path:
    out = src.parent / "repaired"
    done = run("repair", src, out, *options)
    assert done.code == 0, done.out + done.err
    return out


@pytest.mark.parametrize("name", ["reward", "tied", "frozen"])
def test_a_model_saved_without_gathering_is_filled_from_its_shards_and_transformers_loads_it(
    tmp_path: Path, name: str
) -> None:
    import transformers

    out = _repaired(copied(tmp_path, name) / "checkpoint-2")
    wanted = live(name)
    if name == "tied":
        wanted.pop("lm_head.weight")
    assert differences(saved(out), wanted) == []
    config = json.loads((out / "config.json").read_text())
    loaded, told = getattr(transformers, config["architectures"][0]).from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in live(name).items())


@pytest.mark.parametrize("name", ["lora", "head", "head-frozen", "embed-lora"])
def test_an_adapter_is_filled_from_its_shards_and_is_what_lived(tmp_path: Path, name: str) -> None:
    out = _repaired(copied(tmp_path, name) / "checkpoint-2")
    held = live(name)
    wanted = as_adapter(held)
    if name == "head":
        a, b = (wanted.pop(f"{PREFIX}score.lora_{x}.weight").float() for x in "AB")
        weight = held[f"{PREFIX}score.base_layer.weight"]
        wanted[f"{PREFIX}score.weight"] = (weight.float() + 4 * (b @ a)).bfloat16()  # alpha 8 over rank 2
    if name == "head-frozen":
        wanted[f"{PREFIX}score.weight"] = held[f"{PREFIX}score.weight"]
    if name == "embed-lora":
        key = f"{PREFIX}model.embed_tokens.base_layer.weight"
        wanted[key] = held[key]
    assert differences(saved(out), wanted) == []


@pytest.mark.parametrize("name", ["lora", "head", "head-frozen"])
def test_a_repaired_adapter_loads_with_peft_and_scores_as_the_live_model_did(tmp_path: Path, name: str) -> None:
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForSequenceClassification

    run_folder = copied(tmp_path, name)
    out = _repaired(run_folder / "checkpoint-2")
    config = LlamaConfig.from_pretrained(copied(tmp_path / "other", "reward") / "checkpoint-2")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])

    def wrapped(folder: Path) -> object:
        torch.manual_seed(7)  # what is frozen is the same in both; the head of the second comes from the adapter alone
        base = LlamaForSequenceClassification(config).bfloat16()
        found = {n.replace(".base_layer", "").removeprefix(PREFIX): t for n, t in live(name).items()}
        base.load_state_dict({n: t for n, t in found.items() if n in base.state_dict()}, strict=False)
        if folder == out:
            base.score.weight.data.fill_(99)
        model = get_peft_model(base, PeftConfig.from_pretrained(folder), autocast_adapter_dtype=False)
        return model.eval()

    trained, loaded = wrapped(run_folder / "checkpoint-2"), wrapped(out)
    told = trained.load_state_dict(live(name), strict=False)  # type: ignore[attr-defined]
    assert not told.unexpected_keys
    told = set_peft_model_state_dict(loaded, load_peft_weights(str(out)))
    assert not told.unexpected_keys
    assert not [n for n in told.missing_keys if ".lora_" in n or ".modules_to_save." in n]
    with torch.no_grad():
        scores = [m(input_ids=tokens).logits for m in (trained, loaded)]  # type: ignore[operator]
    assert torch.allclose(*scores, rtol=2**-6)  # bf16: the folded head is rounded once
    assert scores[0].abs() > 0.01


def test_each_tensors_source_is_on_the_screen_and_in_the_receipt_without_a_path(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen") / "checkpoint-2"
    done = run("repair", src, tmp_path / "out")
    assert "6 from checkpoint-2/global_step2 (ZeRO-3, 2 ranks): fp32 master, rounded to bfloat16" in done.text
    told = receipt(tmp_path / "out")["repaired"]
    assert told[EMBED] == "checkpoint-2/global_step2 (ZeRO-3, 2 ranks): frozen weight"
    assert told["lm_head.weight"].endswith("fp32 master, rounded to bfloat16")
    assert len(told) == 7
    assert str(tmp_path) not in (tmp_path / "out" / "rlhf-convert.json").read_text()


def test_the_printed_recipe_makes_the_same_folder(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora") / "checkpoint-2"
    printed = run("repair", src, "--print-recipe")
    (tmp_path / "recipe.yaml").write_text(printed.out)
    assert "fill:" in printed.out and "broken: true" in printed.out
    assert run("run", tmp_path / "recipe.yaml", tmp_path / "by-recipe").code == 0
    assert differences(saved(tmp_path / "by-recipe"), as_adapter(live("lora"))) == []


def test_a_dry_run_writes_nothing_and_json_is_one_object(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora") / "checkpoint-2"
    before = listing(tmp_path)
    done = run("repair", src, tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["dry_run"], len(told["repaired"])) == (True, 6)
    assert listing(tmp_path) == before


def test_stage_1_shards_fill_trained_and_frozen_tensors_from_their_module(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen-z1") / "checkpoint-2"
    rewrite(src / "model.safetensors", empty=[EMBED, "model.layers.0.self_attn.q_proj.weight"])
    # A rank's masters are gone, and the weights in the dtype of training are whole all the same.
    next(src.glob("global_step2/*rank_1*optim_states.pt")).unlink()
    assert differences(saved(_repaired(src)), live("frozen-z1")) == []


@pytest.mark.parametrize("lost", [EMBED, "lm_head.weight"])
def test_a_tied_partner_fills_the_other_where_the_config_ties(tmp_path: Path, lost: str) -> None:
    src = copied(tmp_path, "tied", shards=False) / "checkpoint-2"
    rewrite(src / "model.safetensors", put=live("tied"), empty=[lost])
    out = _repaired(src)
    assert torch.equal(saved(out)[lost], live("tied")[lost])
    assert "tied to" in receipt(out)["repaired"][lost]


def test_an_untied_head_is_not_filled_from_the_embedding(tmp_path: Path) -> None:
    src = copied(tmp_path, "tied", shards=False) / "checkpoint-2"
    rewrite(src / "model.safetensors", put=live("tied"), empty=["lm_head.weight"])
    config = json.loads((src / "config.json").read_text()) | {"tie_word_embeddings": False}
    (src / "config.json").write_text(json.dumps(config))
    done = run("repair", src, tmp_path / "out")
    assert (done.code, (tmp_path / "out").exists()) == (3, False)
    assert "tensors-lost" in done.err


def test_a_frozen_weight_comes_from_the_base_where_the_shards_do_not_list_it_as_trained(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen-lean") / "checkpoint-2"
    out = _repaired(src, "--base", src.parent / "base")
    assert differences(saved(out), live("frozen-lean")) == []
    assert receipt(out)["repaired"][EMBED].startswith("base, the base: checkpoint-2/global_step2")


def test_a_base_of_another_revision_is_refused_by_a_frozen_tensor_that_is_whole(tmp_path: Path) -> None:
    src = copied(tmp_path, "frozen-lean") / "checkpoint-2"
    rewrite(src.parent / "base" / "model.safetensors", put={"model.layers.0.self_attn.k_proj.weight": torch.ones(4, 8)})
    done = run("repair", src, tmp_path / "out", "--base", src.parent / "base")
    assert (done.code, (tmp_path / "out").exists()) == (3, False)
    assert "repair-mismatch" in done.err and "k_proj" in done.err


def test_a_weight_under_a_lora_comes_from_the_base_only_with_consent_where_nothing_tells_its_revision(
    tmp_path: Path,
) -> None:
    src = copied(tmp_path, "embed-lora", shards=False) / "checkpoint-2"
    rewrite(src / "adapter_model.safetensors", put=as_adapter(live("embed-lora")))
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    base = ("--base", src.parent / "base")
    done = run("repair", src, tmp_path / "out", *base)
    assert (done.code, (tmp_path / "out").exists()) == (3, False)
    assert "base-unchecked" in done.err
    out = _repaired(src, *base, "--allow", "base-unchecked")
    assert torch.equal(saved(out)[key], live("embed-lora")[key])
    assert "base-unchecked" in receipt(out)["consents"]


def test_a_later_whole_checkpoint_with_the_bases_values_proves_that_a_weight_was_frozen(tmp_path: Path) -> None:
    run_folder = copied(tmp_path, "frozen-lean", shards=False)
    later = run_folder / "checkpoint-3"
    shutil.copytree(run_folder / "checkpoint-2", later)
    rewrite(later / "model.safetensors", put=live("frozen-lean") | {"lm_head.weight": torch.ones(11, 8).bfloat16()})
    src = run_folder / "checkpoint-2"
    rewrite(src / "model.safetensors", put=live("frozen-lean"), empty=[EMBED])
    given = ("--base", run_folder / "base", "--weights-from", later)
    out = _repaired(src, *given)
    assert differences(saved(out), live("frozen-lean")) == []
    shutil.rmtree(out)
    # An earlier one proves nothing: the weight may have been trained since.
    later.rename(run_folder / "checkpoint-1")
    done = run("repair", src, out, *given[:3], run_folder / "checkpoint-1")
    assert (done.code, out.exists()) == (3, False)
    assert "nothing proves that it was frozen" in done.text


def test_a_copy_with_another_name_fills_what_the_first_file_lost(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward", shards=False) / "checkpoint-2"
    torch.save(live("reward"), src / "pytorch_model.bin")
    out = _repaired(src)
    assert differences(saved(out), live("reward")) == []
    assert receipt(out)["repaired"][EMBED] == "pytorch_model.bin beside it: the same tensor"


def test_a_folder_that_is_a_copy_fills_what_is_lost(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward", shards=False) / "checkpoint-2"
    backup = Path(shutil.copytree(src, tmp_path / "backup"))
    rewrite(backup / "model.safetensors", put=live("reward"))
    assert differences(saved(_repaired(src, "--weights-from", backup)), live("reward")) == []


def test_an_adapters_copy_fills_it_where_a_trained_factor_is_equal(tmp_path: Path) -> None:
    src = copied(tmp_path, "head-frozen") / "checkpoint-2"
    backup = Path(shutil.copytree(src, tmp_path / "backup"))
    rewrite(backup / "adapter_model.safetensors", put=as_adapter(live("head-frozen")))
    drop_shards(src.parent)
    lost = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    done = run("repair", src, tmp_path / "out", "--weights-from", backup)
    assert done.code == 0, done.err
    assert torch.equal(saved(tmp_path / "out")[lost], as_adapter(live("head-frozen"))[lost])


def test_pieces_missing_files_and_missing_factors_are_filled_like_empty_ones(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward") / "checkpoint-2"
    q, up = (f"model.layers.0.{m}.weight" for m in ("self_attn.q_proj", "mlp.up_proj"))
    held = load_file(src / "model.safetensors") | {q: live("reward")[q].reshape(-1)[:32]}
    (src / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": {n: t for n, t in held.items() if n not in (up, "score.weight")}}
    for file, content in shards.items():
        save_file(content, src / file, metadata={"format": "pt"})
    index = {n: "model-00002-of-00002.safetensors" if n in (up, "score.weight") else next(iter(shards)) for n in held}
    (src / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert differences(saved(_repaired(src)), live("reward")) == []

    adapter = copied(tmp_path, "lora") / "checkpoint-2"
    rewrite(adapter / "adapter_model.safetensors", drop=[n for n in as_adapter(live("lora")) if "lora_B" in n])
    done = run("repair", adapter, tmp_path / "filled")
    assert done.code == 0, done.err
    assert differences(saved(tmp_path / "filled"), as_adapter(live("lora"))) == []


def test_older_weights_need_consent_and_then_the_whole_model_is_of_that_step(tmp_path: Path) -> None:
    run_folder = copied(tmp_path, "reward")
    shutil.rmtree(run_folder / "checkpoint-2" / "global_step2")
    src, out = run_folder / "checkpoint-2", tmp_path / "out"
    done = run("repair", src, out)
    assert (done.code, out.exists()) == (3, False)
    assert "older-weights" in done.err and "--allow older-weights" in done.err
    assert run("repair", src, out, "--allow", "older-weights").code == 0
    assert differences(saved(out), live("reward", 1)) == []
    told = receipt(out)
    assert all(words.startswith("OLDER: checkpoint-1/global_step1") for words in told["repaired"].values())
    assert "older-weights" in told["consents"]


def test_a_folder_with_shards_and_no_weight_file_is_gathered(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward") / "checkpoint-2"
    (src / "model.safetensors").unlink()
    done = run("repair", src, tmp_path / "out")
    assert done.code == 0, done.err
    assert "no weight file" in done.err
    assert differences(saved(tmp_path / "out"), live("reward")) == []


def test_an_adapter_of_which_only_the_config_is_left_is_filled_whole(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora") / "checkpoint-2"
    (src / "adapter_model.safetensors").unlink()
    assert differences(saved(_repaired(src)), as_adapter(live("lora"))) == []


def test_a_head_that_was_never_saved_is_filled_from_the_shards(tmp_path: Path) -> None:
    src = copied(tmp_path, "reward") / "checkpoint-2"
    rewrite(src / "model.safetensors", put=live("reward"), drop=["score.weight"])
    assert differences(saved(_repaired(src)), live("reward")) == []


def test_an_adapter_folder_apart_is_filled_from_the_shards_that_the_user_names(tmp_path: Path) -> None:
    run_folder = copied(tmp_path, "lora")
    src = Path(shutil.copytree(run_folder / "checkpoint-2", tmp_path / "elsewhere" / "adapter"))
    shutil.rmtree(src / "global_step2")
    out = tmp_path / "out"
    done = run("repair", src, out, "--weights-from", run_folder / "checkpoint-2")
    assert done.code == 0, done.err
    assert "step-unproved" in done.text
    assert differences(saved(out), as_adapter(live("lora"))) == []


def test_an_empty_file_that_peft_prefers_is_replaced_by_the_whole_one_beside_it(tmp_path: Path) -> None:
    src = copied(tmp_path, "lora", shards=False) / "checkpoint-2"
    torch.save(as_adapter(live("lora")), src / "adapter_model.bin")
    out = _repaired(src)
    assert differences(saved(out), as_adapter(live("lora"))) == []
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "rlhf-convert.json",
    ]  # fmt: skip
    assert "whole where adapter_model.safetensors is empty" in str(receipt(out)["repaired"])


@pytest.mark.parametrize(
    "run_folder", [VERL / "critic-fsdp1-n3", DCP / "accelerate-n2", DCP / "tp-n4"], ids=lambda p: p.name
)
def test_states_of_other_trainers_fill_as_deepspeeds_do(tmp_path: Path, run_folder: Path) -> None:
    wanted = zero_live(run_folder)
    src = tmp_path / "src"
    src.mkdir()
    save_file(wanted, src / "model.safetensors", metadata={"format": "pt"})
    rewrite(src / "model.safetensors", empty=[n for n, t in wanted.items() if t.dim() > 1 and "layers" in n])
    config = next(p for p in (run_folder / "huggingface" / "config.json", run_folder / "config.json") if p.exists())
    shutil.copy(config, src)
    # The same pass stores a tied pair once.
    tied = {"lm_head.weight"} if json.loads(config.read_text()).get("tie_word_embeddings") is True else set()
    expected = {n: t for n, t in wanted.items() if n not in tied}
    assert differences(saved(_repaired(src, "--weights-from", run_folder)), expected) == []


def test_a_universal_checkpoint_fills_an_adapter(tmp_path: Path) -> None:
    run_folder = Path(shutil.copytree(UNIVERSAL / "lora-z3-n2", tmp_path / "run"))
    src = run_folder / "adapter"
    src.mkdir()
    shutil.copy(run_folder / "adapter_config.json", src)
    wanted = as_adapter(zero_live(run_folder))
    save_file({n: torch.empty(0, dtype=t.dtype) for n, t in wanted.items()}, src / "adapter_model.safetensors")
    assert differences(saved(_repaired(src, "--weights-from", run_folder)), wanted) == []


def test_a_whole_model_beside_shards_with_buffers_and_shared_names_is_healthy(tmp_path: Path) -> None:
    src = copied(tmp_path, "tied") / "checkpoint-2"
    config = json.loads((src / "config.json").read_text()) | {"tie_word_embeddings": False}
    (src / "config.json").write_text(json.dumps(config))  # the shards know that the head shares its weight
    rewrite(src / "model.safetensors", put=live("tied"), drop=["lm_head.weight"])
    done = run("repair", src, tmp_path / "out")
    assert (done.code, "output-embedding-missing" in done.err) == (3, True)  # transformers makes it RANDOM
    (src / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    done = run("repair", src, tmp_path / "out")
    assert done.code == 0, done.err
    assert "nothing to repair" in done.out
