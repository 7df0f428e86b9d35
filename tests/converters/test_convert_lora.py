"""`convert-lora`: every update is what PEFT merges of the original, computed from the other form by its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import converter
import oracle
from converter.errors import Refused, UsageError
from oracle.bases import Base, edit_config
from oracle.mixtures import EXPERTS, MixtureBase, make_mixture

CONFIG = "adapter_config.json"


def updates(base: Base, *adapters: Path) -> dict[str, Any]:
    """What PEFT adds to each tensor of the base, by names on disk."""
    before, after = oracle.read_tensors(base.path), oracle.peft_merge(base, *adapters)
    return {n: t.double() - before[n].double() for n, t in after.items() if not torch.equal(t, before[n])}


def products(adapter: Path) -> dict[str, Any]:
    """`alpha / r * B A` of each module, as every reader of PEFT's format without patterns computes it."""
    config, held = oracle.read_config(adapter, CONFIG), load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in held.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            assert a.shape[0] == rank
            b = held[key.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = alpha / rank * (b.double() @ a.double())
    return found


def expect_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert sorted(found) == sorted(wanted)
    assert max(float((found[n] - t).norm() / t.norm()) for n, t in wanted.items()) < 2e-6


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """Two ranks, two alphas, scales by the root of the rank, targets by a pattern."""
    folder = tmp_path_factory.mktemp("dense")
    base = oracle.make_base(folder / "base", "llama")
    settings: dict[str, Any] = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 7}, "use_rslora": True}
    targets = r".*\.(?:q_proj|v_proj|down_proj)"
    return base, oracle.make_adapter(folder / "adapter", base, r=4, target_modules=targets, **settings)


@pytest.mark.parametrize(
    "target", ["vllm", "peft@0.13", *(pytest.param(t, marks=pytest.mark.slow) for t in ("transformers@4", "peft"))]
)
def test_every_update_is_that_of_the_original(target: str, dense: tuple[Base, Path], tmp_path: Path) -> None:
    base, adapter = dense
    converter.convert_lora(adapter, tmp_path / "out", for_=target)
    wanted = updates(base, adapter)
    config = oracle.read_config(tmp_path / "out", CONFIG)
    if target == "vllm":
        expect_same(products(tmp_path / "out"), wanted)
        assert (config["r"], config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (
            6,
            {},
            {},
            False,
        )
    expect_same(updates(base, tmp_path / "out"), wanted)
    if target == "peft@0.13":
        assert set(config).isdisjoint(
            {"exclude_modules", "corda_config", "eva_config", "lora_bias", "target_parameters"}
        )


def test_mlx_files_hold_the_same_updates_and_come_back(dense: tuple[Base, Path], tmp_path: Path) -> None:
    base, adapter = dense
    converter.convert_lora(adapter, tmp_path / "mlx", for_="mlx")
    options = oracle.read_config(tmp_path / "mlx", CONFIG)
    assert options["fine_tune_type"] == "lora"
    assert options["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]
    held = load_file(tmp_path / "mlx" / "adapters.safetensors")
    scale = options["lora_parameters"]["scale"]
    wanted = updates(base, adapter)
    made = {
        k.replace("lora_a", "weight"): scale * (a.double() @ held[k.replace("lora_a", "lora_b")].double()).T
        for k, a in held.items()
        if k.endswith("lora_a")
    }
    expect_same(made, wanted)
    assert {a.shape[1] for k, a in held.items() if k.endswith("lora_a")} == {options["lora_parameters"]["rank"]}
    converter.convert_lora(tmp_path / "mlx", tmp_path / "back", for_="peft")
    expect_same(updates(base, tmp_path / "back"), wanted)


def stacked(path: Path, base: MixtureBase, **settings: Any) -> Path:
    more = {"target_parameters": base.parameters, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
    return oracle.make_adapter(path, base, **(more | settings))


PLAIN = "model.layers.1.mlp.experts.{expert}.{leaf}.weight"
DISK = dict.fromkeys(("qwen3_moe", "deepseek_v3", "olmoe"), PLAIN)
DISK["mixtral"] = "model.layers.1.block_sparse_moe.experts.{expert}.{leaf}.weight"
FAMILIES = ["qwen3_moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mixtral", "deepseek_v3", "olmoe"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_for_all_experts_becomes_one_for_each_and_comes_back(family: str, tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", family)
    adapter = stacked(tmp_path / "adapter", base)
    wanted = updates(base, adapter)
    for target in ("transformers@4", "vllm", "peft@0.13"):
        converter.convert_lora(adapter, tmp_path / target, for_=target, base=base.path)
        found = products(tmp_path / target)
        expect_same(found, wanted)
        assert sum("experts" in n for n in found) == 2 * EXPERTS * 3
    converter.convert_lora(adapter, tmp_path / "tinker", for_="tinker", base=base.path)
    factors = load_file(tmp_path / "tinker" / "adapter_model.safetensors")
    scale = oracle.read_config(tmp_path / "tinker", CONFIG)
    for name, leaf in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
        stem = "base_model.model." + DISK[family].format(expert=name, leaf="").removesuffix("..weight")
        a, b = (factors[f"{stem}.lora_{part}.weight"].double() for part in "AB")
        for expert in range(EXPERTS):
            disk = DISK[family].format(expert=expert, leaf=leaf if family != "mixtral" else name)
            made = scale["lora_alpha"] / scale["r"] * b[expert] @ a[expert]
            assert float((made - wanted[disk]).norm() / made.norm()) < 2e-6
    converter.convert_lora(tmp_path / "transformers@4", tmp_path / "back", for_="peft", base=base.path)
    assert len(oracle.read_config(tmp_path / "back", CONFIG)["target_parameters"]) == 4
    expect_same(updates(base, tmp_path / "back"), wanted)


@pytest.mark.slow
def test_experts_without_a_pair_get_zeros_and_ranks_and_scales_their_own(tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "qwen3_moe")
    adapter = stacked(tmp_path / "adapter", base)
    converter.convert_lora(adapter, tmp_path / "apart", for_="transformers@4", base=base.path)
    some = oracle.rewrite_adapter(
        tmp_path / "apart",
        tmp_path / "some",
        change=lambda held: {
            k: v[:2] if "experts.1." in k and "lora_A" in k else v[:, :2] if "experts.1." in k else v
            for k, v in held.items()
            if "experts.2." not in k and "0.mlp.experts.3.up_proj" not in k
        },
    )
    edit_config(some, CONFIG, rank_pattern={r".*experts\.1\..*": 2})
    held = load_file(some / "adapter_model.safetensors")
    config = oracle.read_config(some, CONFIG)
    wanted = {}
    for key, a in held.items():
        if key.endswith("lora_A.weight"):
            b = held[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            wanted[name] = config["lora_alpha"] / a.shape[0] * (b.double() @ a.double())
    converter.convert_lora(some, tmp_path / "back", for_="peft", base=base.path)
    expect_same(updates(base, tmp_path / "back"), wanted)


def _adapter(kind: str, base: Base, path: Path) -> Path:
    if kind == "a saved module":
        return oracle.make_adapter(path, base, modules_to_save=["lm_head"])
    if kind == "biases":
        return oracle.make_adapter(path, oracle.make_base(path.with_name("opt"), "opt"), bias="all")
    if kind == "token rows":
        return oracle.make_adapter(path, base, trainable_token_indices={"embed_tokens": [3, 5]})
    if kind == "the head":
        return oracle.make_adapter(path, base, target_modules=["lm_head", "q_proj"])
    return oracle.make_adapter(path, base, use_dora=True)


@pytest.mark.parametrize(
    ("kind", "target", "code"),
    [
        ("a saved module", "vllm", "adapter-not-for-target"),
        pytest.param("a saved module", "mlx", "adapter-not-for-target", marks=pytest.mark.slow),
        pytest.param("biases", "vllm", "adapter-not-for-target", marks=pytest.mark.slow),
        pytest.param("token rows", "peft@0.13", "adapter-not-for-target", marks=pytest.mark.slow),
        ("the head", "mlx", "adapter-not-for-target"),
        pytest.param("dora", "vllm", "not-plain-lora", marks=pytest.mark.slow),
    ],
)
def test_what_a_program_has_no_place_for_is_refused(
    kind: str, target: str, code: str, dense: tuple[Base, Path], tmp_path: Path
) -> None:
    with pytest.raises(Refused) as refused:
        converter.convert_lora(_adapter(kind, dense[0], tmp_path / "adapter"), tmp_path / "out", for_=target)
    assert refused.value.code == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["ollama", "peft@0.18", "peft@1.0"])
def test_only_known_targets_are_taken(target: str, dense: tuple[Base, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        converter.convert_lora(dense[1], tmp_path / "out", for_=target)


def test_experts_need_their_base(tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "qwen3_moe")
    with pytest.raises(UsageError) as refused:
        converter.convert_lora(stacked(tmp_path / "adapter", base), tmp_path / "out", for_="vllm")
    assert refused.value.code == "base-needed"
