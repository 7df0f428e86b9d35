"""`extract-lora` against PEFT: what it writes loads, says what the tuned model says, and trains on."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import converter
import oracle
from converter.errors import Refused, UsageError
from oracle.bases import Base, edit_config, quiet, write_tensors
from oracle.expected import inputs_for
from oracle.mixtures import make_mixture

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

Values = dict[str, Any]


def tuned_by(base: Base, path: Path, change: Callable[[str, Any, torch.Generator], Any]) -> Path:
    """The base with other values in what `change` returns something for."""
    shutil.copytree(base.path, path)
    noise = torch.Generator().manual_seed(3)
    write_tensors(path, {n: t if (new := change(n, t, noise)) is None else new.to(t.dtype)
                         for n, t in oracle.read_tensors(base.path).items()})  # fmt: skip
    return path


def moved(tensor: Any, noise: torch.Generator, *, rank: int = 3) -> Any:
    """The tensor plus something of a rank, or of every value where it is no matrix."""
    if tensor.dim() != 2:
        return tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
    rows, columns = tensor.shape
    factors = torch.randn(rows, rank, generator=noise), torch.randn(rank, columns, generator=noise)
    return tensor + 0.05 * factors[0] @ factors[1]


def said_by(model: Any, base: Base) -> Any:
    return oracle.logits(model, inputs_for(base))


def with_peft(base: Base, adapter: Path, *, task: str = "CAUSAL_LM", trains: bool = False, **config: Any) -> Any:
    with quiet():
        return peft.PeftModel.from_pretrained(base.load(task=task, **config), adapter, is_trainable=trains)


def receipt(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "rlhf-convert.json").read_text())
    return found


@pytest.fixture(scope="module", params=["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "opt"))])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path, Path]:
    """A base, a model that PEFT merged into it at rank 4, and the adapter that was extracted."""
    folder = tmp_path_factory.mktemp(request.param)
    base = oracle.make_base(folder / "base", request.param)
    adapter = oracle.make_adapter(folder / "adapter", base, r=4)
    shutil.copytree(base.path, folder / "tuned")
    write_tensors(folder / "tuned", oracle.peft_merge(base, adapter))
    converter.extract_lora(base.path, folder / "tuned", folder / "out", rank=4)
    return base, folder / "tuned", folder / "out"


def test_peft_loads_it_and_says_what_the_tuned_model_says(pair: tuple[Base, Path, Path]) -> None:
    base, tuned, out = pair
    wanted = said_by(oracle.load_output(tuned), base)
    assert oracle.relative_difference(said_by(base.load(), base), wanted) > 1e-2
    assert oracle.relative_difference(said_by(with_peft(base, out).eval(), base), wanted) < 1e-6


def test_peft_trains_on_from_it_and_saves_it_under_the_same_names(
    pair: tuple[Base, Path, Path], tmp_path: Path
) -> None:
    base, _, out = pair
    model = with_peft(base, out, trains=True)
    steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = inputs_for(base)["input_ids"]
    losses = []
    for _ in range(2):
        with quiet():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    with quiet():
        model.save_pretrained(tmp_path)
    saved, written = load_file(tmp_path / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in written.items()}


def test_merging_it_gives_the_tuned_model_back(pair: tuple[Base, Path, Path], tmp_path: Path) -> None:
    base, tuned, out = pair
    converter.merge_lora(out, tmp_path / "merged", base=base.path)
    found, wanted = oracle.read_tensors(tmp_path / "merged"), oracle.read_tensors(tuned)
    assert sorted(found) == sorted(wanted)
    assert max(oracle.relative_difference(found[n].double(), t.double()) for n, t in wanted.items()) < 1e-6


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """A base, and a model whose layer 1 alone changed, at full rank."""
    folder = tmp_path_factory.mktemp("full")
    base = oracle.make_base(folder / "base", "llama", dtype="bfloat16")

    def change(name: str, tensor: Any, noise: torch.Generator) -> Any:
        is_one = "layers.1." in name and name.endswith("proj.weight")
        return tensor.float() + 0.05 * torch.randn(tensor.shape, generator=noise) if is_one else None

    return base, tuned_by(base, folder / "tuned", change)


def differences(base: Base, tuned: Path) -> dict[str, Any]:
    before, after = oracle.read_tensors(base.path), oracle.read_tensors(tuned)
    return {n.removesuffix(".weight"): t.double() - before[n].double() for n, t in after.items() if "layers.1." in n}


def test_the_receipt_states_the_error_that_the_best_pair_of_that_rank_has(
    full: tuple[Base, Path], tmp_path: Path
) -> None:
    base, tuned = full
    converter.extract_lora(base.path, tuned, tmp_path / "out", rank=5)
    said = receipt(tmp_path / "out")["tensors"]
    for module, change in differences(base, tuned).items():
        if "proj" not in module:
            continue
        squares = torch.linalg.svdvals(change).square()
        left = float((squares[5:].sum() / squares.sum()).sqrt())
        found = said[f"base_model.model.{module}.lora_B.weight"]
        assert found["relative_error"] == pytest.approx(left, rel=1e-6)
        assert found["energy_kept"] == pytest.approx(1 - left**2, rel=1e-6)


def test_what_did_not_change_gets_no_factors_and_is_not_targeted(full: tuple[Base, Path], tmp_path: Path) -> None:
    base, tuned = full
    converter.extract_lora(base.path, tuned, tmp_path / "out", rank=2)
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(held) == 14
    assert all(".layers.1." in n for n in held)
    targets = oracle.read_config(tmp_path / "out", "adapter_config.json")["target_modules"]
    assert all(t.startswith("model.layers.1.") for t in targets)
    assert sorted(n for n, t in with_peft(base, tmp_path / "out").named_modules() if hasattr(t, "lora_A")) == sorted(
        f"base_model.model.{t}" for t in targets
    )


def test_an_energy_takes_the_least_rank_of_each_matrix_that_keeps_it(full: tuple[Base, Path], tmp_path: Path) -> None:
    base, tuned = full
    converter.extract_lora(base.path, tuned, tmp_path / "out", energy=0.8)
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {}
    for module, change in differences(base, tuned).items():
        if "proj" in module:
            shares = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
            ranks[module] = int((shares < 0.8).sum()) + 1
    assert {m: held[f"base_model.model.{m}.lora_A.weight"].shape[0] for m in ranks} == ranks
    assert len(set(ranks.values())) > 1
    model = with_peft(base, tmp_path / "out")
    assert {m: model.get_submodule(f"base_model.model.{m}").scaling["default"] for m in ranks} == dict.fromkeys(
        ranks, 1
    )


def test_a_reward_model_of_a_causal_base_keeps_its_head_and_norms_whole(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "llama")
    with quiet():
        model = base.load(task="SEQ_CLS", num_labels=1, pad_token_id=0)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "q_proj" in name or "norm" in name or "score" in name:
                    value.copy_(moved(value, noise))
        model.save_pretrained(tmp_path / "rm")
    converter.extract_lora(base.path, tmp_path / "rm", tmp_path / "out", rank=3)
    config = oracle.read_config(tmp_path / "out", "adapter_config.json")
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    found = said_by(with_peft(base, tmp_path / "out", task="SEQ_CLS", num_labels=1, pad_token_id=0).eval(), base)
    assert oracle.relative_difference(found, said_by(model.eval(), base)) < 1e-6
    converter.merge_lora(tmp_path / "out", tmp_path / "merged", base=base.path)
    edit_config(tmp_path / "merged", pad_token_id=0)  # a tokenizer says it, and this base has none
    merged = oracle.load_output(tmp_path / "merged", "AutoModelForSequenceClassification")
    assert oracle.relative_difference(said_by(merged, base), said_by(model.eval(), base)) < 1e-6


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_changed_embedding_is_kept_whole_and_its_tied_head_with_it(tied: bool, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "qwen2", tied=tied)
    tuned = tuned_by(base, tmp_path / "tuned", lambda n, t, g: moved(t, g) if "embed" in n or "up_proj" in n else None)
    converter.extract_lora(base.path, tuned, tmp_path / "out", rank=3)
    saved = oracle.read_config(tmp_path / "out", "adapter_config.json")["modules_to_save"]
    assert saved == (["model.embed_tokens", "lm_head"] if tied else ["model.embed_tokens"])
    wanted = said_by(oracle.load_output(tuned), base)
    assert oracle.relative_difference(said_by(with_peft(base, tmp_path / "out").eval(), base), wanted) < 1e-6


@pytest.mark.parametrize(
    ("changed", "bias"),
    [
        ("q_proj", "all"),
        pytest.param("fc1", "lora_only", marks=pytest.mark.slow),
        pytest.param("layer_norm", "none", marks=pytest.mark.slow),
    ],
)
def test_biases_go_where_peft_looks_for_them(changed: str, bias: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "opt")

    def change(name: str, tensor: Any, noise: torch.Generator) -> Any:
        return moved(tensor, noise) if "fc1.weight" in name or (changed in name and "bias" in name) else None

    tuned = tuned_by(base, tmp_path / "tuned", change)
    converter.extract_lora(base.path, tuned, tmp_path / "out", rank=3)
    assert oracle.read_config(tmp_path / "out", "adapter_config.json")["bias"] == bias
    wanted = said_by(oracle.load_output(tuned), base)
    assert oracle.relative_difference(said_by(with_peft(base, tmp_path / "out").eval(), base), wanted) < 1e-6


@pytest.mark.parametrize("how", [{"rank": 3}, pytest.param({"energy": 0.9999999}, marks=pytest.mark.slow)])
def test_changed_experts_get_a_pair_for_the_stack_that_peft_has_of_them(how: Any, tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "qwen3_moe")

    def change(name: str, tensor: Any, noise: torch.Generator) -> Any:
        is_changed = "1.mlp.experts.2." in name or "0.mlp.experts.0.up_proj" in name or "q_proj" in name
        return moved(tensor, noise) if is_changed else None

    tuned = tuned_by(base, tmp_path / "tuned", change)
    converter.extract_lora(base.path, tuned, tmp_path / "out", **how)
    config = oracle.read_config(tmp_path / "out", "adapter_config.json")
    changed = {"0.mlp.experts.gate_up_proj", "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"}
    assert {t.removeprefix("model.layers.") for t in config["target_parameters"]} == changed
    before, after = oracle.read_tensors(tuned), oracle.peft_merge(base, tmp_path / "out")
    assert max(float((after[n].double() - t.double()).norm() / t.double().norm()) for n, t in before.items()) < 1e-6


def _refused(folder: Path, how: str) -> tuple[Path, Path]:
    base = oracle.make_base(folder / "base", "llama")
    if how == "equal":
        return base.path, base.path
    if how == "norms only":
        return base.path, tuned_by(base, folder / "tuned", lambda n, t, g: moved(t, g) if "norm" in n else None)
    if how == "fewer tokens":
        return base.path, oracle.make_base(folder / "tuned", "llama", vocab=150).path
    if how == "an adapter":
        return base.path, oracle.make_adapter(folder / "adapter", base)
    tuned = tuned_by(base, folder / "tuned", lambda n, t, g: moved(t, g) if "proj" in n else None)
    held = oracle.read_tensors(tuned)
    write_tensors(tuned, held | {"model.layers.0.mlp.gain": torch.ones(3)})
    return base.path, tuned


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("equal", "no-op"),
        ("norms only", "adapter-no-place"),
        ("fewer tokens", "models-differ"),
        ("an adapter", "models-differ"),
        ("a parameter", "tensors-unexpected"),
    ],
)
def test_what_an_adapter_has_no_place_for_is_refused(how: str, code: str, tmp_path: Path) -> None:
    base, tuned = _refused(tmp_path, how)
    with pytest.raises(Refused) as refused:
        converter.extract_lora(base, tuned, tmp_path / "out", rank=2)
    assert refused.value.code == code
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "llama")
    shutil.copytree(base.path, tmp_path / "fp8")
    held = oracle.read_tensors(base.path)
    name = "model.layers.0.mlp.up_proj"
    held |= {
        f"{name}.weight": held[f"{name}.weight"].to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": torch.ones(1, 1),
    }
    write_tensors(tmp_path / "fp8", held)
    edit_config(tmp_path / "fp8", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(Refused) as refused:
        converter.extract_lora(base.path, tmp_path / "fp8", tmp_path / "out", rank=2)
    assert refused.value.code == "base-quantised"


@pytest.mark.parametrize("how", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_a_rank_or_an_energy_is_given_and_is_one(how: Any, full: tuple[Base, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        converter.extract_lora(full[0].path, full[1], tmp_path / "out", **how)
