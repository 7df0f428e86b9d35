"""LoRA of Megatron's fused matrices: the adapter that is gathered does in transformers what it did in Megatron.

The oracle is each of Megatron's matrices with `alpha / r * B @ A` added, against the model that PEFT merged, put into
Megatron's modules by `mcore/models.py`.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from mcore.compare import written
from mcore.models import LAYERS, built, in_megatron
from oracle.command import run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call

RANK, ALPHA = 2, 6
MODULES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def _factors(case: str, modules: tuple[str, ...]) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A model, its tensors by Megatron's names, and A and B for each of its modules."""
    model = built(case)
    whole = in_megatron({n: t.detach() for n, t in model.state_dict().items()}, model.config)
    generator = torch.Generator().manual_seed(7)
    found = {}
    for number in range(LAYERS):
        for module in modules:
            rows, columns = whole[f"decoder.layers.{number}.{module}.weight"].shape
            a, b = (torch.randn(shape, generator=generator) for shape in ((RANK, columns), (rows, RANK)))
            found[f"decoder.layers.{number}.{module}"] = (a, b)
    return model, whole, found


def _saved(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that one process saves alone
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder.parent


def _stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    groups: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        groups.setdefault(re.sub(r"layers\.\d+\.", "layers.", name), []).append(tensor)
    return {n: torch.stack(t) for n, t in groups.items()}


def _of_bridge(factors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As Megatron-Bridge saves them: adapters alone, layers stacked."""
    apart = {f"{m}.adapter.linear_in.weight": a for m, (a, _) in factors.items()}
    return _stacked(apart | {f"{m}.adapter.linear_out.weight": b for m, (_, b) in factors.items()})


def _of_swift(factors: dict[str, Any], whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ms-swift saves them: PEFT's names in Megatron's modules, with the model below."""
    base = {
        (n.removesuffix(".weight") + ".base_layer.weight" if n.removesuffix(".weight") in factors else n): t
        for n, t in whole.items()
    }
    base |= {f"{m}.lora_A.default.weight": a for m, (a, _) in factors.items()}
    return base | {f"{m}.lora_B.default.weight": b for m, (_, b) in factors.items()}


def _expect_merged(model: dict[str, torch.Tensor], config: Any, whole: Any, factors: Any) -> None:
    have = in_megatron(model, config)
    for name, tensor in whole.items():
        if name.startswith("decoder."):
            a, b = factors.get(name.removesuffix(".weight"), (None, None))
            wanted = tensor if a is None else tensor + ALPHA / RANK * (b @ a)
            torch.testing.assert_close(have[name], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("case", "writer"), [("qwen2", "bridge"), ("qwen3", "bridge"), ("qwen3", "swift")])
def test_an_adapter_does_in_transformers_what_it_did_in_megatron(tmp_path: Path, case: str, writer: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, whole, factors = _factors(case, MODULES)
    model.save_pretrained(tmp_path / "base")
    state = _of_bridge(factors) if writer == "bridge" else _of_swift(factors, whole)
    folder, out = _saved(tmp_path / "run" / "iter_0000005", state), tmp_path / "out"
    done = run("gather", folder, out, "--base", tmp_path / "base", "--emit", "adapter", "--lora-alpha", ALPHA)
    assert done.code == 0, done.err
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out)
    merged = loaded.merge_and_unload().state_dict()
    _expect_merged({n: t.detach() for n, t in merged.items()}, model.config, whole, factors)
    held = load_file(out / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1."
    assert torch.equal(held[f"{stem}self_attn.k_proj.lora_A.weight"], held[f"{stem}self_attn.v_proj.lora_A.weight"])


@pytest.mark.parametrize("writer", ["bridge", "swift"])
def test_a_merged_model_has_the_sum_in_every_fused_matrix(tmp_path: Path, writer: str) -> None:
    model, whole, factors = _factors("qwen3", MODULES)
    model.save_pretrained(tmp_path / "base")
    state = _of_bridge(factors) if writer == "bridge" else _of_swift(factors, whole)
    folder, out = _saved(tmp_path / "run" / "iter_0000005", state), tmp_path / "out"
    done = run("gather", folder, out, "--base", tmp_path / "base", "--emit", "merged", "--lora-alpha", ALPHA)
    assert done.code == 0, done.err
    _expect_merged(written(out), model.config, whole, factors)


def test_alpha_is_taken_from_the_run_s_own_config(tmp_path: Path) -> None:
    model, _, factors = _factors("qwen3", MODULES)
    model.save_pretrained(tmp_path / "base")
    folder = _saved(tmp_path / "run" / "iter_0000005", _of_bridge(factors))
    (folder / "iter_0000005" / "run_config.yaml").write_text(
        f"model:\n  num_layers: 2\npeft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  alpha: {ALPHA}\n  dim: {RANK}\n"
    )
    done = run("gather", folder, tmp_path / "out", "--base", tmp_path / "base")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"]) == (ALPHA, RANK)


def test_without_any_record_alpha_is_asked_for(tmp_path: Path) -> None:
    model, _, factors = _factors("qwen3", MODULES)
    model.save_pretrained(tmp_path / "base")
    folder = _saved(tmp_path / "run" / "iter_0000005", _of_bridge(factors))
    done = run("gather", folder, tmp_path / "out", "--base", tmp_path / "base")
    assert done.code == 2
    assert "lora-alpha-unknown" in done.err
    assert not (tmp_path / "out").exists()


def test_projections_with_factors_of_their_own_keep_them(tmp_path: Path) -> None:
    model, _, _ = _factors("qwen3", ())
    model.save_pretrained(tmp_path / "base")
    stem = "decoder.layers.0.self_attention.linear_qkv.adapter."
    sizes = {"q": 32, "k": 16, "v": 16}
    state = {f"{stem}adapter_{p}.linear_in.weight": torch.full((RANK, 16), float(n)) for n, p in enumerate(sizes)}
    state |= {f"{stem}adapter_{p}.linear_out.weight": torch.ones(rows, RANK) for p, rows in sizes.items()}
    folder, out = _saved(tmp_path / "run" / "iter_0000005", state), tmp_path / "out"
    done = run("gather", folder, out, "--base", tmp_path / "base", "--lora-alpha", ALPHA)
    assert done.code == 0, done.err
    held = load_file(out / "adapter_model.safetensors")
    for number, projection in enumerate(sizes):
        tensor = held[f"base_model.model.model.layers.0.self_attn.{projection}_proj.lora_A.weight"]
        assert torch.equal(tensor, torch.full((RANK, 16), float(number)))


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("decoder.layers.0.mlp.experts.experts.linear_fc1.adapter.linear_in.weight", "megatron-lora"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.adapter_w.linear_in.weight", "megatron-lora"),
        ("embedding.word_embeddings.adapter.linear_in.weight", "megatron-lora"),
        ("decoder.layers.7.self_attention.linear_proj.adapter.linear_in.weight", "megatron-config"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight", "megatron-lora"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path: Path, key: str, code: str) -> None:
    model, _, factors = _factors("qwen3", MODULES[1:2])
    model.save_pretrained(tmp_path / "base")
    apart = {f"{m}.adapter.linear_in.weight": a for m, (a, _) in factors.items()}
    folder = _saved(tmp_path / "run" / "iter_0000005", apart | {key: torch.ones(3, RANK)})
    done = run("gather", folder, tmp_path / "out", "--base", tmp_path / "base", "--lora-alpha", ALPHA)
    assert done.code == 3
    assert code in done.err
    assert not (tmp_path / "out").exists()
