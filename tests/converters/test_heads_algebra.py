"""What is exact and what isn't: biases, mean and std, rows, MLPs, leftovers, fresh heads."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import heads_zoo as zoo
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.errors import Refused, UsageError
from heads_run import base_of, opened, remapped, stored, written

SEQCLS = zoo.FORMS["hf-seqcls"]
MEAN, STD = -1.375, 2.7182817


def rm(folder: Path, dialect: str = "hf-seqcls", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """A Llama reward model with its head's bias, and more in its config."""
    form = zoo.FORMS[dialect]
    model = zoo.live("llama", dtype)
    source = zoo.save(form, model, folder, bias=model.bias if form.bias else None)
    return with_config(source, **config)


def with_config(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def notes(context: Context) -> dict[str, str]:
    return {n.code: n.text for n in context.notes}


def test_a_bias_that_has_no_place_is_refused_with_its_size_the_spread_and_the_ways_out(tmp_path: Path) -> None:
    model = zoo.live("llama")
    with pytest.raises(Refused) as caught:
        remapped(opened(rm(tmp_path / "rm", "trl-vhead")), "openrlhf")
    error = caught.value
    assert error.code == "head-bias"
    assert f"{model.bias.item():.6g} to every score" in error.what
    assert f"norm, by which scores spread, is {model.weight.double().norm():.4g}" in error.what
    assert "--bias drop" in str(error.next)
    assert "into-mean" not in str(error.next)


def test_a_dropped_bias_lowers_every_score_by_itself_and_says_so(tmp_path: Path) -> None:
    model, context = zoo.live("llama"), Context()
    out = written(
        remapped(opened(rm(tmp_path / "rm", "trl-vhead")), "openrlhf", context, bias="drop"), tmp_path / "out"
    )
    found = zoo.score("llama", out, zoo.FORMS["openrlhf"])
    torch.testing.assert_close(
        found, zoo.expected(model, bias=model.bias) - model.bias.double(), rtol=1e-12, atol=1e-12
    )
    assert f"{model.bias.item():.6g} is dropped" in notes(context)["head-bias"]


def test_a_bias_becomes_a_mean_only_where_the_loader_keeps_it(tmp_path: Path) -> None:
    model, source = zoo.live("llama"), opened(rm(tmp_path / "rm", "trl-vhead"))
    old = written(remapped(source, "openrlhf@0.5.5", role="reward", bias="into-mean"), tmp_path / "out")
    assert (config_of(old)["mean"], config_of(old)["std"]) == (-model.bias.item(), 1.0)
    with pytest.raises(Refused, match="transformers 5") as caught:
        remapped(source, "openrlhf@0.11.2", role="reward", bias="into-mean")
    assert caught.value.code == "bias-into-mean"


def test_mean_and_std_are_folded_into_weight_and_bias_with_one_rounding(tmp_path: Path) -> None:
    """fp32: the exact quotient of doubles, rounded once."""
    model = zoo.live("llama", torch.float32)
    source = rm(tmp_path / "rm", "openrlhf", torch.float32, mean=MEAN, std=STD)
    out = written(remapped(opened(source), "hf-tokcls"), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["score.weight"], (model.weight.double() / STD).float())
    assert found["score.bias"].item() == torch.tensor(-MEAN / STD).float().item()
    assert not {"mean", "std", "value_head_prefix"} & config_of(out).keys()


def test_a_mean_that_has_no_place_is_refused_and_measured_by_std(tmp_path: Path) -> None:
    source = opened(rm(tmp_path / "rm", "openrlhf", mean=MEAN, std=STD))
    with pytest.raises(Refused) as caught:
        remapped(source, "hf-seqcls")
    assert caught.value.code == "head-bias"
    assert f"{-MEAN / STD:.6g} to every score" in caught.value.what
    assert f"spread by {STD:.6g} (std)" in caught.value.what


def test_the_scale_stays_where_the_shift_is_dropped(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = opened(rm(tmp_path / "rm", "openrlhf", mean=MEAN, std=STD))
    out = written(remapped(source, "hf-seqcls", bias="drop"), tmp_path / "out")
    expected = (model.weight.float() / torch.tensor(STD)).bfloat16()
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], expected)


def test_mean_and_std_can_be_left_out(tmp_path: Path) -> None:
    context = Context()
    source = opened(rm(tmp_path / "rm", "openrlhf", mean=MEAN, std=STD))
    out = written(remapped(source, "hf-seqcls", context, normaliser="drop"), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], zoo.live("llama").weight)
    assert "left out" in notes(context)["normaliser-dropped"]


def test_openrlhf_keeps_mean_and_std_and_is_told_where_transformers_5_loses_them(tmp_path: Path) -> None:
    source = opened(rm(tmp_path / "rm", "openrlhf", mean=MEAN, std=STD))
    for version, loses in (("0.5.5", False), ("0.11.2", True)):
        context = Context()
        out = written(remapped(source, f"openrlhf@{version}", context, role="critic"), tmp_path / version)
        assert (config_of(out)["mean"], config_of(out)["std"]) == (MEAN, STD)
        assert ("normaliser-lost" in notes(context)) is loses


def test_openrlhf_s_mean_and_std_become_safe_rlhf_s_mean_and_variance(tmp_path: Path) -> None:
    source = opened(rm(tmp_path / "rm", "openrlhf", mean=MEAN, std=STD))
    out = config_of(written(remapped(source, "safe-rlhf"), tmp_path / "out"))
    assert (out["mean"], out["var"], out["do_normalize"]) == ([MEAN], [STD * STD], True)
    assert (out["score_dim"], out["bias"], out["score_type"]) == (1, False, "reward")


def test_safe_rlhf_s_buffers_count_only_where_its_config_says_so(tmp_path: Path) -> None:
    for name, used in (("on", True), ("off", False)):
        source = rm(tmp_path / name, "safe-rlhf", do_normalize=used)
        file = source / "model.safetensors"
        buffers = {"mean": torch.tensor([MEAN]), "var": torch.tensor([4.0]), "count": torch.tensor([7])}
        save_file(load_file(file) | {f"normalizer.{n}": t for n, t in buffers.items()}, file)
        given = opened(source)
        out = remapped(given, "hf-tokcls")
        found = load_file(written(out, tmp_path / f"{name}-out") / "model.safetensors")
        model = zoo.live("llama")
        scale, shift = (2.0, MEAN) if used else (1.0, 0.0)
        assert torch.equal(found["score.weight"], (model.weight.float() / scale).bfloat16())
        assert torch.equal(found["score.bias"], ((model.bias.float() - shift) / scale).bfloat16())
        assert set(out.dropped) == {"normalizer.mean", "normalizer.var", "normalizer.count"}


@pytest.mark.parametrize(("kind", "scale", "shift"), [("reward", 2.0, MEAN), ("cost", 2.0, 0.0), ("critic", 1.0, 0.0)])
def test_safe_rlhf_normalises_rewards_scales_costs_and_leaves_critics(
    kind: str, scale: float, shift: float, tmp_path: Path
) -> None:
    """As in its ScoreModelMixin: affine, scale, identity."""
    config = {"do_normalize": True, "mean": [MEAN], "var": [4.0], "score_type": kind}
    source = rm(tmp_path / "rm", "safe-rlhf", **config)
    found = load_file(written(remapped(opened(source), "hf-tokcls"), tmp_path / "out") / "model.safetensors")
    model = zoo.live("llama")
    assert torch.equal(found["score.weight"], (model.weight.float() / scale).bfloat16())
    assert torch.equal(found["score.bias"], ((model.bias.float() - shift) / scale).bfloat16())


def test_a_normaliser_goes_into_the_head_of_safe_rlhf_s_critic_which_normalises_nothing(tmp_path: Path) -> None:
    model = zoo.live("llama", torch.float32)
    source = rm(tmp_path / "rm", "openrlhf", torch.float32, mean=MEAN, std=STD)
    out = written(remapped(opened(source), "safe-rlhf", role="critic"), tmp_path / "out")
    found, config = load_file(out / "model.safetensors"), config_of(out)
    assert torch.equal(found["score_head.weight"], (model.weight.double() / STD).float())
    assert found["score_head.bias"].item() == torch.tensor(-MEAN / STD).float().item()
    assert (config["bias"], config["do_normalize"], config["score_type"]) == (True, False, "critic")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"mean": 1.0}, "one finite number"),
        ({"mean": [1.0], "std": "x"}, "one"),
        ({"mean": 0.0, "std": 0.0}, "standard deviation of 0"),
    ],
)
def test_a_normaliser_that_its_own_loader_would_fail_on_is_refused(
    config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=says) as caught:
        remapped(opened(rm(tmp_path / "rm", "openrlhf", **config)), "hf-tokcls")
    assert caught.value.code == "normaliser"


# Several rows


def several(folder: Path, rows: int) -> tuple[Path, torch.Tensor]:
    weight = torch.randn(rows, zoo.HIDDEN, generator=torch.Generator().manual_seed(rows))
    model = dataclasses.replace(zoo.live("llama", torch.float32), weight=weight)
    return zoo.save(SEQCLS, model, folder), weight


def test_a_head_with_two_labels_needs_to_be_told_which(tmp_path: Path) -> None:
    source, _ = several(tmp_path / "rm", 2)
    with pytest.raises(Refused, match="2 rows") as caught:
        remapped(opened(source), "openrlhf")
    assert caught.value.code == "head-labels"
    assert "--label-weights=-1,1" in str(caught.value.next)


def test_one_label_is_a_stretch_of_the_file_and_weights_are_an_exact_sum(tmp_path: Path) -> None:
    source, weight = several(tmp_path / "rm", 3)
    picked = load_file(written(remapped(opened(source), "openrlhf", label=1), tmp_path / "a") / "model.safetensors")
    assert torch.equal(picked["score.weight"], weight[1:2])
    weights = (-1.0, 0.25, 2.0)
    summed = remapped(opened(source), "openrlhf", label_weights=weights)
    found = load_file(written(summed, tmp_path / "b") / "model.safetensors")
    expected = (torch.tensor([weights], dtype=torch.float64) @ weight.double()).float()
    assert torch.equal(found["score.weight"], expected)


@pytest.mark.parametrize(
    "fields", [{"label": 3}, {"label": -1}, {"label_weights": (1.0,)}, {"label": 0, "label_weights": (1.0, 0.0, 0.0)}]
)
def test_labels_that_the_head_does_not_have_are_usage_errors(fields: dict[str, Any], tmp_path: Path) -> None:
    source, _ = several(tmp_path / "rm", 3)
    with pytest.raises(UsageError):
        remapped(opened(source), "openrlhf", **fields)


def test_a_loader_of_several_labels_gets_them_all(tmp_path: Path) -> None:
    source, weight = several(tmp_path / "rm", 3)
    out = written(remapped(opened(source), "vllm"), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], weight)
    assert len(config_of(out)["id2label"]) == 3


# MLPs


def test_a_general_mlp_has_no_linear_form_and_goes_to_trlx_alone(tmp_path: Path) -> None:
    model = zoo.live("llama", units=zoo.HIDDEN)
    source = zoo.save(zoo.FORMS["score-mlp"], model, tmp_path / "rm")
    with pytest.raises(Refused, match="an MLP of 16 hidden units") as caught:
        remapped(opened(source), "openrlhf")
    assert caught.value.code == "head-not-linear"
    base = opened(base_of(model, tmp_path / "base"))
    out = written(remapped(opened(source), "trlx", base=base), tmp_path / "out")
    found = zoo.score("llama", out, zoo.FORMS["trlx"])
    torch.testing.assert_close(found, zoo.expected(model, mlp=model.mlp), rtol=1e-12, atol=1e-12)
    assert zoo.read_main(out, zoo.FORMS["trlx"])["v_head.0.weight"].shape == (2 * zoo.HIDDEN, zoo.HIDDEN)


def test_an_mlp_wider_than_trlx_s_is_refused(tmp_path: Path) -> None:
    model = zoo.live("llama", units=3 * zoo.HIDDEN)
    source = zoo.save(zoo.FORMS["score-mlp"], model, tmp_path / "rm")
    with pytest.raises(Refused, match="48 hidden units") as caught:
        remapped(opened(source), "trlx", base=opened(base_of(model, tmp_path / "base")))
    assert caught.value.code == "head-units"


def test_trlx_s_branch_of_blocks_is_no_head(tmp_path: Path) -> None:
    source = zoo.save(zoo.FORMS["trlx"], zoo.live("llama"), tmp_path / "rm")
    file = source / "pytorch_model.bin"
    torch.save(zoo.loaded(file) | {"v_head.decoder_blocks.0.mlp.up_proj.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(Refused, match="branch of the model's own blocks") as caught:
        remapped(opened(source), "trlx")
    assert caught.value.code == "head-is-blocks"


def test_unused_units_of_trlx_s_mlp_are_zero_or_drawn_and_without_effect(tmp_path: Path) -> None:
    model, source = zoo.live("llama"), rm(tmp_path / "rm")
    base = opened(base_of(model, tmp_path / "base"))
    for init, drawn in (("none", False), ("normal", True)):
        out = written(remapped(opened(source), "trlx", base=base, init_head=init), tmp_path / init)
        first = zoo.read_main(out, zoo.FORMS["trlx"])["v_head.0.weight"]
        assert bool(first[2:].ne(0).all()) is drawn
        found = zoo.score("llama", out, zoo.FORMS["trlx"])
        torch.testing.assert_close(found, zoo.expected(model), rtol=1e-12, atol=1e-12)


# Where heads come from


def test_row_0_of_lm_head_is_the_head_of_a_model_that_says_it_is_one(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = opened(base_of(model, tmp_path / "nemotron"))
    found = remapped(source, "openrlhf", read_as="lm-head-row0")
    out = written(found, tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], model.state["lm_head.weight"][:1])
    assert "lm_head.weight" in found.dropped


def test_a_leftover_of_a_sharded_layout_is_taken_row_by_row_with_consent_alone(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = zoo.save(zoo.FORMS["openrlhf-old"], model, tmp_path / "orz")
    file = source / "model.safetensors"
    save_file(load_file(file) | {"value_head.weight": model.weight.reshape(8, -1).clone()}, file)
    with pytest.raises(Refused, match="leftover of a sharded layout") as caught:
        remapped(opened(source), "openrlhf")
    assert (caught.value.code, caught.value.consent) == ("head-reshaped", True)
    allowed = Context(allow=frozenset({"head-reshaped"}))
    out = written(remapped(opened(source), "openrlhf", allowed), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], model.weight)
    assert "head-reshaped" in allowed.consents


def test_a_model_without_a_head_is_refused_with_what_would_bring_one(tmp_path: Path) -> None:
    source = opened(base_of(zoo.live("llama"), tmp_path / "base"))
    with pytest.raises(Refused) as caught:
        remapped(source, "verl", role="critic")
    assert caught.value.code == "head-missing"
    assert "--init-head zeros" in str(caught.value.next)


def test_a_fresh_head_is_zeros_or_the_documented_generator_s_numbers_and_the_receipt_says_so(tmp_path: Path) -> None:
    source = opened(base_of(zoo.live("llama"), tmp_path / "base"))
    for init, expected in (("zeros", torch.zeros(1, zoo.HIDDEN)), ("normal", drawn(seed=7))):
        context = Context()
        made = remapped(source, "verl", context, role="critic", init_head=init, seed=7)
        found = load_file(written(made, tmp_path / init) / "model.safetensors")
        assert torch.equal(found["score.weight"], expected.bfloat16())
        assert "learnt nothing" in context.consents["init-head"]
        assert "init-head" in notes(context)


def drawn(seed: int) -> torch.Tensor:
    """Box and Muller over Python's generator, variance 1 / (h + 1)."""
    source, values = random.Random(seed), []
    for _ in range(zoo.HIDDEN // 2):
        u, v = torch.tensor([source.random(), source.random()], dtype=torch.float64)
        radius = (-2 * torch.log(1 - u)).sqrt() / (zoo.HIDDEN + 1) ** 0.5
        values += [radius * torch.cos(2 * torch.pi * v), radius * torch.sin(2 * torch.pi * v)]
    return torch.stack(values).view(1, -1)


def test_a_head_that_is_there_is_never_thrown_away_for_a_fresh_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would throw it away"):
        remapped(opened(rm(tmp_path / "rm")), "verl", init_head="zeros")


# The output embedding


def test_a_missing_output_embedding_is_refused_unless_it_is_tied_or_the_base_has_it(tmp_path: Path) -> None:
    model = zoo.live("llama")
    source = opened(rm(tmp_path / "rm"))
    with pytest.raises(Refused, match="no lm_head") as caught:
        remapped(source, "llamafactory")
    assert caught.value.code == "lm-head-missing"
    base = opened(base_of(model, tmp_path / "base"))
    out = written(remapped(source, "llamafactory", base=base), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], model.state["lm_head.weight"])
    tied = zoo.save(SEQCLS, zoo.live("qwen2"), tmp_path / "tied")
    found = stored(written(remapped(opened(tied), "llamafactory"), tmp_path / "tied-out"), zoo.FORMS["llamafactory"])
    assert "lm_head.weight" not in found
    assert config_of(tmp_path / "tied-out")["tie_word_embeddings"] is True


def test_an_output_embedding_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = zoo.live("llama")
    folder = base_of(model, tmp_path / "base")
    state = model.state | {"lm_head.weight": torch.zeros(zoo.VOCAB + 8, zoo.HIDDEN)}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(Refused) as caught:
        remapped(opened(rm(tmp_path / "rm")), "trl-vhead", base=opened(folder))
    assert caught.value.code == "lm-head-shape"


def test_embeddings_that_deepspeed_chat_would_resize_are_refused(tmp_path: Path) -> None:
    given: Checkpoint = opened(rm(tmp_path / "rm"))
    name = "model.embed_tokens.weight"
    cut = given.replace(
        tensors={**given.tensors, name: dataclasses.replace(given.tensors[name], info=_rows(given, name))}
    )
    with pytest.raises(Refused, match="61 rows") as caught:
        remapped(cut, "dschat")
    assert (caught.value.code, caught.value.consent) == ("vocab-not-padded", True)


def _rows(given: Checkpoint, name: str) -> Any:
    return dataclasses.replace(given.tensors[name].info, shape=(61, zoo.HIDDEN))
