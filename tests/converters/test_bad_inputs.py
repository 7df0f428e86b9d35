"""Adapters that are no adapter of their base, listed: each is refused by code, and nothing is written.

PEFT merges those marked with a star without an error: `IN_PEFT` is what it makes of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from oracle.command import listing, run

Tensors = dict[str, Any]
P = "base_model.model.model.layers.0.self_attn.q_proj"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
A, B = f"{P}.lora_A.weight", f"{P}.lora_B.weight"


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {n.replace(old, new): v for n, v in t.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {n: v for n, v in t.items() if part not in n}


def changed(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda t: {n: how(v).contiguous() if n == name else v for n, v in t.items()}


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(held: torch.Tensor) -> torch.Tensor:
        out = held.clone()
        out[0, 0] = value
        return out

    return change


def added(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda t: t | {name: tensor}


TENSORS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "other architecture*": ("adapter-unmatched", renamed("self_attn.q_proj", "attention.wq")),
    "one more layer*": ("adapter-unmatched", added(A.replace("layers.0", "layers.7"), torch.ones(3, 48))),
    "a name without its layers*": ("adapter-unmatched", renamed("model.layers", "model.blocks")),
    "another prefix of one module*": ("adapter-unmatched", renamed("layers.1.self_attn", "layers.1.attn")),
    "a stray tensor*": ("adapter-unmatched", added("base_model.model.stray.weight", torch.ones(3))),
    "no lora_B of one module*": ("adapter-incomplete", without("layers.0.self_attn.q_proj.lora_B")),
    "no lora_A of one module*": ("adapter-incomplete", without("layers.0.self_attn.q_proj.lora_A")),
    "no lora_B at all*": ("adapter-incomplete", without("lora_B")),
    "no lora_A at all*": ("adapter-incomplete", without("lora_A")),
    "a magnitude that nobody asks for*": (
        "adapter-incomplete", added(f"{P}.lora_magnitude_vector", torch.ones(48)),
    ),
    "a NaN*": ("nonfinite", changed(B, filled(float("nan")))),
    "an infinity*": ("nonfinite", changed(A, filled(float("inf")))),
    "every lora_B zero*": ("no-op", lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()}),
    "an A of one column less": ("adapter-shape", changed(A, lambda v: v[:, 1:])),
    "an A of one column more": ("adapter-shape", changed(A, lambda v: torch.cat([v, v[:, :1]], 1))),
    "a B of one row less": ("adapter-shape", changed(B, lambda v: v[1:])),
    "a B of twice the rows": ("adapter-shape", changed(B, lambda v: torch.cat([v, v]))),
    "an A of another rank": ("adapter-rank", changed(A, lambda v: v[:2])),
    "a B of another rank": ("adapter-shape", changed(B, lambda v: v[:, :2])),
    "factors of another rank": (
        "adapter-rank", lambda t: t | {A: t[A][:2].contiguous(), B: t[B][:, :2].contiguous()},
    ),
    "a flat A": ("adapter-rank", changed(A, lambda v: v.flatten())),
    "an A of three dimensions": ("adapter-rank", changed(A, lambda v: v[None])),
    "an A and a B exchanged": ("adapter-rank", lambda t: t | {A: t[B], B: t[A]}),
    "an empty B": ("zero3-empty-tensors", changed(B, lambda v: v.flatten()[:0])),
    "an empty A": ("zero3-empty-tensors", changed(A, lambda v: v.flatten()[:0])),
    "all empty": ("zero3-empty-tensors", lambda t: {n: v.flatten()[:0].clone() for n, v in t.items()}),
    "one module twice": ("adapter-incomplete", lambda t: t | {A.replace("lora_A", "lora_A.default"): t[A]}),
    "two adapters in one file": (
        "adapter-incomplete", lambda t: t | {n.replace(".weight", ".other.weight"): v for n, v in t.items()},
    ),
    "a bias of lora_B without a bias below": ("adapter-bias", added(f"{P}.lora_B.bias", torch.ones(48))),
    "a bias that was not trained": ("adapter-unmatched", added(f"{P}.base_layer.bias", torch.ones(48))),
    "a weight that would replace the base's": ("adapter-unexpected", added(f"{P}.weight", torch.ones(48, 48))),
    "a norm that nobody saved": (
        "adapter-unexpected", added("base_model.model.model.norm.weight", torch.ones(48)),
    ),
    "a head of another width": (
        "adapter-shape", added("base_model.model.lm_head.weight", torch.ones(163, 40)),
    ),
    "rows of tokens that nobody lists": (
        "adapter-tokens", added(ROWS, torch.ones(2, 48)),
    ),
    "factors of another method": ("adapter-incomplete", added(f"{P}.hada_w1_a", torch.ones(48, 3))),
    "a scaling vector of IA3": ("adapter-incomplete", added(f"{P}.ia3_l", torch.ones(48, 1))),
    "integers": ("adapter-incomplete", changed(A, lambda v: v.to(torch.int32))),
    "factors of an expert": (
        "adapter-unmatched", renamed("layers.0.self_attn.q_proj", "layers.0.mlp.experts.0.gate_proj"),
    ),
    "no tensor": ("adapter-empty", lambda t: {}),
}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha 0": ("no-op", {"lora_alpha": 0}),
    "alpha of a word": ("adapter-config", {"lora_alpha": "16"}),
    "alpha not finite": ("adapter-config", {"lora_alpha": 1e300}),
    "rank 0": ("adapter-config", {"r": 0}),
    "rank of another adapter": ("adapter-rank", {"r": 5}),
    "rank of a fraction": ("adapter-config", {"r": 3.5}),
    "a pattern of another rank": ("adapter-rank", {"rank_pattern": {"q_proj": 7}}),
    "a pattern that is no expression": ("adapter-pattern", {"rank_pattern": {"(": 3}}),
    "a pattern that takes for ever": ("adapter-pattern", {"alpha_pattern": {"(a+)+$": 3}}),
    "patterns as a list": ("adapter-config", {"rank_pattern": ["q_proj"]}),
    "DoRA without magnitudes*": ("adapter-incomplete", {"use_dora": True}),
    "a switch as a word": ("adapter-config", {"use_rslora": "yes"}),
    "a switch of next year*": ("adapter-field-unknown", {"use_a_method_of_next_year": True}),
    "no type": ("peft-type-unsupported", {"peft_type": None}),
    "a type that nobody has": ("peft-type-unsupported", {"peft_type": "LORB"}),
    "a prompt": ("peft-type-unmergeable", {"peft_type": "PROMPT_TUNING"}),
    "X-LoRA": ("peft-type-unmergeable", {"peft_type": "XLORA"}),
    "activated LoRA": ("adapter-field-unsupported", {"alora_invocation_tokens": [3, 4]}),
    "QA-LoRA": ("adapter-field-unsupported", {"use_qalora": True}),
    "Arrow": ("adapter-field-unsupported", {"arrow_config": {"top_k": 2}}),
    "Megatron's layers": ("adapter-field-unsupported", {"megatron_config": {"tp": 2}}),
    "LoftQ": ("adapter-base-moved", {"init_lora_weights": "loftq"}),
    "CorDA": ("adapter-base-moved", {"init_lora_weights": "corda"}),
    "PiSSA of a random decomposition": ("adapter-base-moved", {"init_lora_weights": "pissa_niter_4"}),
    "a start that nobody knows": ("adapter-field-unknown", {"init_lora_weights": "magic"}),
    "a reward model without its head": ("head-missing", {"task_type": "SEQ_CLS"}),
    "rows of tokens that are not there": ("adapter-tokens", {"trainable_token_indices": [1, 2]}),
    "parameters that are not there": ("adapter-incomplete", {"target_parameters": ["experts.down_proj"]}),
    "a bias of a word": ("adapter-config", {"bias": "some"}),
    "replication as a word": ("adapter-config", {"layer_replication": "0-4"}),
}

CASES = {**TENSORS, **CONFIGS}

IN_PEFT: dict[str, tuple[int, int, int]] = {
    "other architecture*": (2, 2, 0),
    "one more layer*": (4, 4, 0),
    "a name without its layers*": (0, 0, 0),
    "another prefix of one module*": (2, 2, 0),
    "a stray tensor*": (4, 4, 0),
    "no lora_B of one module*": (3, 3, 0),
    "no lora_A of one module*": (4, 3, 0),
    "no lora_B at all*": (0, 0, 0),
    "no lora_A at all*": (4, 0, 0),
    "a magnitude that nobody asks for*": (4, 4, 0),
    "a NaN*": (4, 3, 1),
    "an infinity*": (4, 3, 1),
    "every lora_B zero*": (0, 0, 0),
    "DoRA without magnitudes*": (4, 0, 0),
    "a switch of next year*": (4, 4, 0),
}
"""What PEFT 0.21.2 writes: of the four adapted weights, how many are no longer the base's, how many are what the sound
adapter gives, and how many tensors are not finite. A missing lora_A is drawn anew: the update is random."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[oracle.Base, Path]:
    home = tmp_path_factory.mktemp("bad")
    base = oracle.make_base(home / "base")
    return base, oracle.make_adapter(home / "adapter", base, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def sound(pair: tuple[oracle.Base, Path]) -> tuple[Path, Path]:
    return pair[0].path, pair[1]


def write_bad(name: str, adapter: Path, bad: Path) -> Path:
    """The sound adapter with what a case changes."""
    how = CASES[name][1]
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    if isinstance(how, dict):
        config |= how
    else:
        tensors = how(tensors)
    bad.mkdir()
    save_file({n: t.clone() for n, t in tensors.items()}, bad / "adapter_model.safetensors", {"format": "pt"})
    (bad / "adapter_config.json").write_text(json.dumps(config))
    return bad


def test_the_list_is_as_long_as_it_has_to_be() -> None:
    assert len(CASES) >= 60
    assert sum(name.endswith("*") for name in CASES) >= 13


@pytest.mark.parametrize("name", CASES)
def test_a_bad_adapter_is_refused_and_nothing_is_written(name: str, sound: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sound
    code, _ = CASES[name]
    bad = write_bad(name, adapter, tmp_path / "bad")
    before = listing(tmp_path)
    ran = run("merge-lora", bad, tmp_path / "out", "--base", base)
    assert (ran.code, listing(tmp_path)) == (3, before), ran.text
    assert f"REFUSED {code}:" in ran.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("*")])
def test_peft_merges_what_is_marked_without_an_error(name: str, pair: tuple[oracle.Base, Path], tmp_path: Path) -> None:
    base, adapter = pair
    before, expected = oracle.read_tensors(base.path), oracle.peft_merge(base, adapter)
    adapted = [n for n in before if not expected[n].equal(before[n])]
    found = oracle.peft_merge(base, write_bad(name, adapter, tmp_path / "bad"))
    changed = sum(not found[n].equal(before[n]) for n in adapted)
    right = sum(found[n].equal(expected[n]) for n in adapted)
    assert (changed, right, sum(not t.isfinite().all() for t in found.values())) == IN_PEFT[name]
