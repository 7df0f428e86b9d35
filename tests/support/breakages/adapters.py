"""Breakages of adapters that PEFT wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from breakages.sound import HIDDEN, PT, Breakage, Tensors, beside, edit, store
from healthy.shrink import build

FILE = "adapter_model.safetensors"
Change = Callable[[Path], object]


def having(change: Callable[[Tensors], Tensors]) -> Change:
    return lambda f: store(f, change, FILE)


def config(**changes: Any) -> Change:
    return lambda f: edit(f, "adapter_config.json", **changes)


def twin(folder: Path) -> None:
    """As OpenRLHF up to 0.5.5 leaves it after ZeRO-3: the good file pickled, the empty one beside."""
    torch.save(load_file(folder / FILE), folder / "adapter_model.bin")
    store(folder, lambda t: {n: torch.empty(0) for n in t}, FILE)


def head_with_lora(t: Tensors) -> Tensors:
    rest = {n: v for n, v in t.items() if "score" not in n}
    stem = "base_model.model.score"
    return rest | {f"{stem}.lora_A.weight": torch.ones(2, HIDDEN), f"{stem}.lora_B.weight": torch.ones(1, 2)}


def both(*changes: Change) -> Change:
    return lambda f: [change(f) for change in changes]


def over_bert(folder: Path, extra: str = "") -> None:
    """A reward adapter over a masked language model, whose pooler was random and frozen."""
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    BertForMaskedLM(config).save_pretrained(folder.parent / "bert")
    model = BertForSequenceClassification.from_pretrained(folder.parent / "bert", num_labels=1)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(folder)
    edit(folder, "adapter_config.json", base_model_name_or_path="./bert")
    if extra:
        more = {f"base_model.model.{extra}.lora_A.weight": torch.ones(2, HIDDEN),
                f"base_model.model.{extra}.lora_B.weight": torch.ones(HIDDEN, 2)}  # fmt: skip
        store(folder, lambda t: {**t, **more}, FILE)
        edit(folder, "adapter_config.json", target_modules=["query", extra])


def without_its_base(folder: Path) -> None:
    """As the folder is on a machine that has no copy of the base."""
    edit(folder, "adapter_config.json", base_model_name_or_path="nobody/has-it")


def without_a_task(folder: Path) -> None:
    """A head that classifies sequences as well as tokens, and nothing that says which."""
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    BertModel(config).save_pretrained(folder.parent / "bert")
    model = BertForSequenceClassification.from_pretrained(folder.parent / "bert", num_labels=1)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(folder)
    edit(folder, "adapter_config.json", base_model_name_or_path="./bert", task_type=None)


def as_fsdp_state(folder: Path) -> None:
    """As accelerate leaves the state of a PEFT model under FSDP."""
    torch.save(load_file(folder / FILE), folder / "pytorch_model_fsdp.bin")
    (folder / FILE).unlink()


def over_experts(folder: Path) -> None:
    """LoRA on the experts of a mixture."""
    mixture(folder)
    stem = "base_model.model.model.layers.0.mlp.experts"
    own = {f"{stem}.lora_A.weight": torch.ones(4, 16), f"{stem}.lora_B.weight": torch.ones(64, 4)}
    save_file(own, folder / FILE, metadata=PT)
    edit(folder, "adapter_config.json", target_modules=[], target_parameters=["experts.gate_up_proj"], r=2)


def mixture(folder: Path) -> Path:
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder.parent / "moe")
    return folder.parent / "moe"


def without_an_expert(folder: Path) -> None:
    """LoRA on the experts of a mixture whose base lacks one of them."""
    over_experts(folder)
    store(folder.parent / "moe", lambda t: {n: v for n, v in t.items() if "experts.1.w3" not in n})


def over_interleaved(folder: Path) -> None:
    """LoRA on experts whose rows transformers interleaves when it loads them."""
    build("causal", "inkling2_text").save_pretrained(folder.parent / "bert")
    stems = [f"base_model.model.model.layers.{n}.mlp.experts" for n in range(2)]
    own = {f"{stem}.lora_A.weight": torch.ones(16, 32) for stem in stems}
    own |= {f"{stem}.lora_B.weight": torch.ones(32, 16) for stem in stems}
    save_file(own, folder / FILE, metadata=PT)
    edit(folder, "adapter_config.json", task_type=None, target_parameters=["experts.gate_up_proj"])


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"

ADAPTERS: dict[str, Breakage] = {
    "adapter-empty-twin": Breakage("adapter", twin, "fixed"),
    "adapter-empty": Breakage("adapter", having(lambda t: {}), "lost"),
    "adapter-and-model": Breakage(
        "adapter", lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors", metadata=PT), "told"
    ),
    "adapter-config-missing": Breakage("adapter", lambda f: (f / "adapter_config.json").unlink(), "advice"),
    "adapter-config": Breakage("adapter", config(lora_alpha="much"), "advice"),
    "adapter-shape": Breakage(
        "adapter",
        having(lambda t: {n: v.repeat(1, 2) if n.endswith("lora_A.weight") else v for n, v in t.items()}),
        "advice",
    ),
    "adapter-rank": Breakage("adapter", config(r=16), "advice"),
    "adapter-half": Breakage(
        "adapter", having(lambda t: {n: v for n, v in t.items() if "v_proj.lora_A" not in n}), "lost"
    ),
    "adapter-targets-missing": Breakage(
        "adapter", having(lambda t: {n: v for n, v in t.items() if "layers.0" not in n}), "advice"
    ),
    "adapter-inconsistent": Breakage(
        "adapter",
        both(without_its_base, having(lambda t: {n: v for n, v in t.items() if "layers.0.self_attn.v" not in n})),
        "lost",
    ),
    "adapter-untargeted": Breakage("adapter", both(without_its_base, config(target_modules=["v_proj"])), "advice"),
    "adapter-incomplete": Breakage(
        "adapter", having(lambda t: {**t, f"{LAYER}.lora_magnitude_vector": torch.ones(16)}), "advice"
    ),
    "adapter-unexpected": Breakage(
        "adapter", having(lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(16)}), "advice"
    ),
    "adapter-unmatched": Breakage(
        "adapter", having(lambda t: {n.replace("layers.0", "layers.9"): v for n, v in t.items()}), "advice"
    ),
    "adapter-field-unknown": Breakage("adapter", config(use_something_new=True), "advice"),
    "adapter-pattern": Breakage("adapter", config(rank_pattern={"(?P<x": 4}), "advice"),
    "adapter-field-unsupported": Breakage("adapter", config(use_qalora=True), "told"),
    "adapter-base-moved": Breakage("adapter", config(init_lora_weights="corda"), "advice"),
    "adapter-bias": Breakage(
        "adapter",
        both(
            config(lora_bias=True),
            having(lambda t: {**t, **{n.replace("weight", "bias"): torch.ones(16) for n in t if "lora_B" in n}}),
        ),
        "told",
    ),
    "adapter-tokens": Breakage("adapter", config(trainable_token_indices=[1, 99]), "advice"),
    "vocab-mismatch": Breakage(
        "adapter", having(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(40, 16)}), "advice"
    ),
    "peft-type-unsupported": Breakage("adapter", config(peft_type="NOVEL"), "told"),
    "peft-type-unmergeable": Breakage(
        "adapter",
        both(
            config(peft_type="PROMPT_TUNING", num_virtual_tokens=4, token_dim=16),
            having(lambda t: {"prompt_embeddings": torch.ones(4, 16)}),
        ),
        "told",
    ),
    "adapter-task-unknown": Breakage("adapter", without_a_task, "advice"),
    "adapter-named-otherwise": Breakage("adapter", as_fsdp_state, "fixed"),
    "adapter-files-unread": Breakage(
        "adapter", lambda f: save_file({"tower.weight": torch.ones(3)}, f / "extra.safetensors", metadata=PT), "advice"
    ),
    "lora-alpha-zero": Breakage("adapter", config(lora_alpha=0), "advice"),
    "no-op": Breakage(
        "adapter", having(lambda t: {n: torch.zeros_like(v) if "lora_B" in n else v for n, v in t.items()}), "lost"
    ),
    "adapter-keys-named": Breakage(
        "adapter", having(lambda t: {n.replace(".weight", ".default.weight"): v for n, v in t.items()}), "fixed"
    ),
    "base-differs": Breakage("adapter", lambda f: beside(f, "whole", "another"), "told", ("--base", "{here}/another")),
    "base-quantised": Breakage(
        "adapter",
        lambda f: edit(beside(f, "whole", "whole"), quantization_config={"quant_method": "fp8"}),
        "told",
        ("--base", "{here}/whole"),
    ),
    "head-base-lost": Breakage("reward-adapter", having(head_with_lora), "lost"),
    "head-missing-adapter": Breakage(
        "reward-adapter", having(lambda t: {n: v for n, v in t.items() if "score" not in n}), "lost"
    ),
    "task-type-wrong": Breakage("reward-adapter", config(task_type="CAUSAL_LM"), "advice"),
    "pair-lora": Breakage(
        "adapter",
        lambda f: edit(beside(f, "adapter", "actor"), "adapter_config.json", r=4),
        "told",
        ("--with-actor", "{here}/actor"),
    ),
    "head-incomplete": Breakage("reward-adapter", over_bert, "advice", ("--base", "{here}/bert")),
    "head-class": Breakage(
        "reward-adapter",
        lambda f: over_bert(f, "cls.predictions.transform.dense"),
        "advice",
        ("--base", "{here}/bert"),
    ),
    "adapter-fused": Breakage("adapter", over_interleaved, "told", ("--base", "{here}/bert")),
    "adapter-expert-layout": Breakage(
        "adapter", both(over_experts, config(lora_B_layout="sideways")), "advice", ("--base", "{here}/moe")
    ),
    "base-experts": Breakage("adapter", without_an_expert, "advice", ("--base", "{here}/moe")),
    "config-unreadable-adapter": Breakage("adapter", lambda f: (f / "adapter_config.json").write_text("{"), "advice"),
}
