"""What `merge-lora` refuses: one clear error, exit 3 (or 2 for usage), and nothing new on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle.adapters import CONFIG, WEIGHTS
from oracle.command import run
from oracle.workshop import Workshop


def test_sound_adapter_is_accepted(shop: Workshop) -> None:
    """The control: what the tests below break was whole."""
    ran = run("merge-lora", shop.adapter, shop.out, "--base", shop.base.path)
    assert ran.code == 0, ran.err


def test_adapter_of_another_architecture_is_refused(shop: Workshop) -> None:
    other = oracle.make_base(shop.folder / "other", "gpt2")
    adapter = oracle.make_adapter(shop.folder / "foreign", other)
    shop.refuses(adapter, words=("c_attn", "architecture"))


def test_adapter_of_a_wider_model_is_refused(shop: Workshop) -> None:
    other = oracle.make_base(shop.folder / "other", hidden=64)
    adapter = oracle.make_adapter(shop.folder / "foreign", other)
    shop.refuses(adapter, words=("64", "48"))


def test_adapter_of_a_deeper_model_is_refused(shop: Workshop) -> None:
    other = oracle.make_base(shop.folder / "other", num_hidden_layers=3)
    adapter = oracle.make_adapter(shop.folder / "foreign", other)
    shop.refuses(adapter, words=("layers.2",))


def test_one_key_that_matches_no_weight_is_refused_by_name(shop: Workshop) -> None:
    adapter = shop.changed(
        lambda t: {k.replace("layers.1.mlp.up_proj", "layers.1.mlp.sideways_proj"): v for k, v in t.items()}
    )
    shop.refuses(adapter, words=("sideways_proj",))


def test_stray_tensor_is_refused_by_name(shop: Workshop) -> None:
    import torch

    adapter = shop.changed(lambda t: t | {"base_model.model.model.optimizer_step": torch.ones(3)})
    shop.refuses(adapter, words=("optimizer_step",))


def test_base_weight_left_in_the_adapter_that_no_rule_asks_for_is_refused(shop: Workshop) -> None:
    import torch

    name = "base_model.model.model.layers.0.mlp.up_proj.weight"
    shop.refuses(shop.changed(lambda t: t | {name: torch.ones(83, 48)}), words=("up_proj.weight",))


def test_rank_that_the_config_does_not_promise_is_refused(shop: Workshop) -> None:
    ran = shop.refuses(shop.configured(r=4), words=("rank",))
    assert "3" in ran.text
    assert "4" in ran.text


def test_rank_pattern_that_the_tensors_contradict_is_refused(shop: Workshop) -> None:
    shop.refuses(shop.configured(rank_pattern={"up_proj": 5}), words=("up_proj", "rank"))


def test_factors_that_do_not_fit_each_other_are_refused(shop: Workshop) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    shop.refuses(shop.changed(lambda t: t | {name: t[name][:, :2]}), words=("up_proj",))


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_factor_without_its_other_half_is_refused(shop: Workshop, lost: str) -> None:
    name = f"base_model.model.model.layers.0.mlp.up_proj.{lost}.weight"
    shop.refuses(shop.changed(lambda t: {k: v for k, v in t.items() if k != name}), words=("up_proj", lost))


def test_missing_shard_is_refused_by_name(shop: Workshop) -> None:
    shard = sorted(shop.base.path.glob("*.safetensors"))[1]
    shard.unlink()
    shop.refuses(shop.adapter, words=(shard.name,))


def test_shard_cut_short_is_refused_by_name(shop: Workshop) -> None:
    shard = sorted(shop.base.path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    shop.refuses(shop.adapter, words=(shard.name,))


def test_shard_cut_inside_its_header_is_refused_by_name(shop: Workshop) -> None:
    shard = min(shop.base.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:60])
    shop.refuses(shop.adapter, words=(shard.name,))


def test_adapter_cut_short_is_refused_by_name(shop: Workshop) -> None:
    file = shop.adapter / WEIGHTS
    file.write_bytes(file.read_bytes()[:-4])
    shop.refuses(shop.adapter, words=(WEIGHTS,))


@pytest.mark.parametrize("names", ["all", "one"])
def test_empty_adapter_tensors_are_named_as_a_zero3_save(shop: Workshop, names: str) -> None:
    import torch

    adapter = shop.changed(
        lambda t: {
            k: torch.empty(0, dtype=v.dtype) if names == "all" or "layers.0.mlp.up_proj.lora_B" in k else v
            for k, v in t.items()
        }
    )
    shop.refuses(adapter, words=("ZeRO-3", "up_proj.lora_B" if names == "one" else "lora_A"))


def test_adapter_folder_without_its_config_is_refused(shop: Workshop) -> None:
    (shop.adapter / CONFIG).unlink()
    shop.refuses(shop.adapter, words=(CONFIG,))


def test_adapter_folder_without_its_weights_is_refused(shop: Workshop) -> None:
    (shop.adapter / WEIGHTS).unlink()
    shop.refuses(shop.adapter, words=(WEIGHTS,))


def test_base_folder_without_its_config_is_refused(shop: Workshop) -> None:
    (shop.base.path / "config.json").unlink()
    shop.refuses(shop.adapter, words=("config.json",))


def test_mistyped_adapter_path_gets_the_nearest_match(shop: Workshop) -> None:
    ran = shop.refuses(shop.folder / "adaptr", words=("adaptr", "adapter"))
    assert str(shop.adapter) in ran.text or "adapter" in ran.text.replace("adaptr", "")
    assert "huggingface.co" not in ran.text


def test_mistyped_base_path_gets_the_nearest_match(shop: Workshop) -> None:
    ran = shop.refuses(shop.adapter, base=shop.folder / "bsae", words=("bsae",))
    assert "base" in ran.text.replace("bsae", "").replace("--base", "")
    assert "huggingface.co" not in ran.text


def test_swapped_arguments_get_the_corrected_command(shop: Workshop) -> None:
    before = oracle.listing(shop.folder)
    ran = run("merge-lora", shop.base.path, shop.out, "--base", shop.adapter)
    assert ran.code == 2
    assert f"rlhf-convert merge-lora {shop.adapter} {shop.out} --base {shop.base.path}" in ran.text
    assert oracle.listing(shop.folder) == before


def test_a_base_given_as_the_adapter_is_recognised(shop: Workshop) -> None:
    shop.refuses(shop.base.path, words=("adapter",), code=2)


def test_an_adapter_given_as_the_base_is_recognised(shop: Workshop) -> None:
    shop.refuses(shop.adapter, base=shop.adapter, words=("adapter",), code=2)


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_existing_output_is_refused(shop: Workshop, what: str) -> None:
    if what == "folder":
        shop.out.mkdir()
        (shop.out / "notes.txt").write_text("mine")
    elif what == "file":
        shop.out.write_text("mine")
    else:
        shop.out.symlink_to(shop.folder / "nowhere")
    shop.refuses(shop.adapter, words=("exists", "out"))


def test_existing_output_that_is_not_ours_survives_overwrite(shop: Workshop) -> None:
    shop.out.mkdir()
    (shop.out / "notes.txt").write_text("mine")
    shop.refuses(shop.adapter, "--overwrite", words=("out",))


@pytest.mark.parametrize("place", ["base/out", "adapter/out"])
def test_output_inside_an_input_is_refused(shop: Workshop, place: str) -> None:
    shop.out = shop.folder / place
    shop.refuses(shop.adapter, words=("inside",))


def test_output_in_a_folder_that_does_not_exist_leaves_nothing_half_made(shop: Workshop) -> None:
    """Either the parent is made and the merge is whole, or it is refused and nothing is made."""
    out = shop.folder / "deep" / "out"
    ran = run("merge-lora", shop.adapter, out, "--base", shop.base.path)
    if ran.code == 0:
        oracle.load_output(out)
    else:
        assert ran.code in (2, 3)
        assert not out.parent.exists()


def _zero_b(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}


def test_adapter_that_changes_nothing_is_refused_until_allowed(shop: Workshop) -> None:
    adapter = shop.changed(_zero_b)
    shop.refuses(adapter, words=("no-op", "--allow no-op", "lora_B"))
    ran = run("merge-lora", adapter, shop.out, "--base", shop.base.path, "--allow", "no-op")
    assert ran.code == 0, ran.err
    oracle.same_bits(oracle.read_tensors(shop.out), oracle.read_tensors(shop.base.path))
    assert "no-op" in (shop.out / "rlhf-convert.json").read_text()


def test_alpha_zero_is_refused_until_allowed(shop: Workshop) -> None:
    """verl exports `lora_alpha: 0` where the real value is known (design, habits to avoid)."""
    adapter = shop.configured(lora_alpha=0)
    shop.refuses(adapter, words=("no-op", "lora_alpha"))
    ran = run("merge-lora", adapter, shop.out, "--base", shop.base.path, "--allow", "no-op")
    assert ran.code == 0, ran.err


def test_update_too_small_for_the_dtype_is_refused_until_allowed(tmp_path: Path) -> None:
    """Every delta rounds away in bf16: the output would be the base."""
    base = oracle.make_base(tmp_path / "base", dtype="bfloat16")
    made = oracle.make_adapter(tmp_path / "made", base)
    adapter = oracle.rewrite_adapter(
        made, tmp_path / "adapter", change=lambda t: {k: v * 1e-9 if "lora_B" in k else v for k, v in t.items()}
    )
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base.path)
    assert ran.code == 3
    assert "no-op" in ran.text
    assert not (tmp_path / "out").exists()
    assert run("merge-lora", adapter, tmp_path / "out", "--base", base.path, "--allow", "no-op").code == 0
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(base.path))


def test_weight_zero_for_every_adapter_is_refused(shop: Workshop) -> None:
    shop.refuses(shop.adapter, "--weight", "0", words=("no-op",))


def test_one_zero_factor_is_counted_and_not_refused(shop: Workshop) -> None:
    zeroed = "layers.0.mlp.up_proj.lora_B"
    adapter = shop.changed(lambda t: {k: v * 0 if zeroed in k else v for k, v in t.items()})
    ran = run("merge-lora", adapter, shop.out, "--base", shop.base.path)
    assert ran.code == 0, ran.err
    assert "lora_B" in ran.text
    assert "up_proj" in ran.text


def test_replaced_head_beside_zero_factors_is_no_no_op(tmp_path: Path) -> None:
    """A reward head trained over a frozen backbone: every lora_B is zero, so it asks; with consent the head is kept."""
    base = oracle.make_base(tmp_path / "base", pad_token_id=0)
    made = oracle.make_adapter(tmp_path / "made", base, task="SEQ_CLS")
    adapter = oracle.rewrite_adapter(made, tmp_path / "adapter", change=_zero_b)
    assert run("merge-lora", adapter, tmp_path / "out", "--base", base.path).code == 3
    assert run("merge-lora", adapter, tmp_path / "out", "--base", base.path, "--allow", "no-op").code == 0
    head = oracle.adapters.adapter_tensors(adapter)["base_model.model.score.weight"]
    assert oracle.read_tensors(tmp_path / "out")["score.weight"].equal(head)


def test_input_files_that_are_json_of_another_kind_are_refused(shop: Workshop) -> None:
    (shop.adapter / CONFIG).write_text(json.dumps(["not", "a", "mapping"]))
    shop.refuses(shop.adapter, words=(CONFIG,))
