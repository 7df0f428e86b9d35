"""Adapters as PEFT saves them: every method that it has, and each way of using LoRA."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from healthy.shrink import build, moved
from oracle.bases import quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers

WEIGHTS = "adapter_model.safetensors"
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def base(folder: Path, kind: str = "llama", task: str = "causal", **more: Any) -> Path:
    """A small base model."""
    with quiet():
        build(task, kind, **more).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        config: PEFT's config class.
        task: PEFT's task type; None puts PEFT on the class that the base names.
        kind, of: type and task of the base.
        settings: of the config.
    """

    name: str
    config: str = "LoraConfig"
    task: str | None = "CAUSAL_LM"
    kind: str = "llama"
    of: str = "causal"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return "-".join([self.name, *([self.task] if self.task not in (None, "CAUSAL_LM") else [])])

    def write(self, out: Path, folder: Path) -> Path:
        """Train it, in effect, over the base in `folder`, and save it."""
        with quiet():
            auto = _AUTO[self.task] if self.task else None
            if auto is None:
                config = json.loads((folder / "config.json").read_text())
                auto = config["architectures"][0]
            labels = {"num_labels": 1} if self.task in ("SEQ_CLS", "TOKEN_CLS") else {}
            model = getattr(transformers, auto).from_pretrained(folder, **labels)
            settings = {"task_type": self.task, **self.settings}
            if self.config == "LoraConfig":
                settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | settings
            wrapped = peft.get_peft_model(model, getattr(peft, self.config)(**settings))
            moved(wrapped)
            wrapped.save_pretrained(out)
        return out


def records(adapter: Path, base: Path | str) -> None:
    """Let an adapter record another base: one that is not on this machine, for instance."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


_QV = {"target_modules": ["q_proj", "v_proj"]}
_PROMPT = {"num_virtual_tokens": 4}

METHODS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {**_QV, "total_step": 10, "init_r": 4, "target_r": 2},
    "BoneConfig": {**_QV, "r": 4},
    "C3AConfig": {**_QV, "block_size": 8},
    "CPTConfig": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "DeloraConfig": {**_QV, "r": 4},
    "FourierFTConfig": {**_QV, "n_frequency": 8},
    "HRAConfig": {**_QV, "r": 4},
    "IA3Config": {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LNTuningConfig": {},
    "LoHaConfig": {**_QV, "r": 2},
    "LoKrConfig": {**_QV, "r": 2},
    "MissConfig": {**_QV, "r": 4},
    "MultitaskPromptTuningConfig": _PROMPT,
    "OFTConfig": {**_QV, "oft_block_size": 8},
    "PolyConfig": {**_QV, "r": 2},
    "PrefixTuningConfig": _PROMPT,
    "PromptEncoderConfig": {**_PROMPT, "encoder_hidden_size": 16},
    "PromptTuningConfig": _PROMPT,
    "RandLoraConfig": {**_QV, "r": 4},
    "RoadConfig": {**_QV, "group_size": 4},
    "ShiraConfig": {**_QV, "r": 2},
    "TrainableTokensConfig": {"target_modules": ["embed_tokens"], "token_indices": [1, 5]},
    "VBLoRAConfig": {**_QV, "vector_length": 8, "num_vectors": 16, "topk": 2},
    "VeraConfig": {**_QV, "r": 4},
    "WaveFTConfig": {**_QV, "n_frequency": 8},
}
"""Methods by PEFT's config class; a version of PEFT may not have all of them."""

LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank-pattern": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    "layers": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "one-module": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    "part-of-name": {"target_modules": ["self_attn.q_proj"]},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "both-saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "tokens-named": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "lora-bias": {"lora_bias": True},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "activated": {"alora_invocation_tokens": [3, 4]},
}

BASES: dict[str, tuple[str, str, str | None, Any]] = {
    # name: (task of the base, its type, PEFT's task, targets)
    "qwen2": ("causal", "qwen2", "CAUSAL_LM", "all-linear"),
    "gpt2": ("causal", "gpt2", "CAUSAL_LM", ["c_attn"]),
    "gpt_neox": ("causal", "gpt_neox", "CAUSAL_LM", "all-linear"),
    "phi3": ("causal", "phi3", "CAUSAL_LM", "all-linear"),
    "opt": ("causal", "opt", "CAUSAL_LM", "all-linear"),
    "qwen3_moe": ("causal", "qwen3_moe", "CAUSAL_LM", "all-linear"),
    "qwen3_moe-mlp": ("causal", "qwen3_moe", "CAUSAL_LM", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "deepseek_v3": ("causal", "deepseek_v3", "CAUSAL_LM", ["q_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "mixtral": ("causal", "mixtral", "CAUSAL_LM", "all-linear"),
    "bert-classifier": ("seqcls", "bert", "SEQ_CLS", "all-linear"),
    "roberta-classifier": ("seqcls", "roberta", "SEQ_CLS", "all-linear"),
    "bart-classifier": ("seqcls", "bart", "SEQ_CLS", ["q_proj", "v_proj"]),
    "t5-classifier": ("seqcls", "t5", "SEQ_CLS", ["q", "v"]),
    "xlnet-classifier": ("seqcls", "xlnet", "SEQ_CLS", "all-linear"),
    "funnel-classifier": ("seqcls", "funnel", "SEQ_CLS", "all-linear"),
    "gpt2-critic": ("tokcls", "gpt2", "TOKEN_CLS", ["c_attn"]),
    "qwen2-critic": ("tokcls", "qwen2", "TOKEN_CLS", ["q_proj", "v_proj"]),
    "llama-reward": ("seqcls", "llama", "SEQ_CLS", "all-linear"),
    "t5": ("seq2seq", "t5", "SEQ_2_SEQ_LM", ["q", "v"]),
    "whisper": ("bare", "whisper", None, ["q_proj", "v_proj"]),
    "vit": ("images", "vit", None, ["q_proj", "v_proj"]),
    "llava": ("multimodal", "llava", None, ["q_proj", "v_proj"]),
    "qwen2_5_vl": ("multimodal", "qwen2_5_vl", None, "all-linear"),
    "gemma3": ("multimodal", "gemma3", None, ["q_proj", "v_proj"]),
}

RARE = {
    "BoneConfig", "C3AConfig", "CPTConfig", "DeloraConfig", "FourierFTConfig", "HRAConfig", "MissConfig",
    "MultitaskPromptTuningConfig", "PolyConfig", "RandLoraConfig", "RoadConfig", "ShiraConfig", "VBLoRAConfig",
    "WaveFTConfig", "over-gemma3", "over-funnel-classifier", "over-mixtral", "over-deepseek_v3", "over-whisper",
    "lora-excluded", "lora-one-module", "lora-part-of-name", "lora-bias-lora", "lora-gaussian",
    "over-roberta-classifier",
}  # fmt: skip
"""Adapters of the slow run."""

HEAD_IN_BASE_ALONE = ("over-bart-classifier", "over-t5-classifier", "over-xlnet-classifier")
"""PEFT saves `score` and `classifier` by itself; these heads have other names, and are in the base or lost."""

ADAPTERS = [
    *(Adapter(f"lora-{name}", settings=each) for name, each in LORA.items()),
    *(Adapter(f"reward-{n}", task="SEQ_CLS", settings=LORA[n]) for n in ("plain", "all-linear", "dora", "rslora")),
    *(Adapter(f"critic-{n}", task="TOKEN_CLS", settings=LORA[n]) for n in ("plain", "dora")),
    *(
        Adapter(f"over-{name}", task=task, kind=kind, of=of, settings={"target_modules": targets})
        for name, (of, kind, task, targets) in BASES.items()
    ),
    *(Adapter(name, name, settings=each) for name, each in METHODS.items() if hasattr(peft, name)),
    *(
        Adapter(name, name, "SEQ_CLS", settings=METHODS[name])
        for name in ("IA3Config", "LoHaConfig", "AdaLoraConfig", "VeraConfig", "PrefixTuningConfig")
    ),
]


def quantised(folder: Path) -> None:
    """A base as bitsandbytes leaves it on the Hub: its config says so, and weights are bytes with their scales."""
    from oracle.bases import edit_config, read_tensors, write_tensors

    tensors = read_tensors(folder)
    for name, value in list(tensors.items()):
        if "_proj.weight" in name:
            tensors[name] = torch.zeros(value.numel() // 2, 1, dtype=torch.uint8) + 119
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(value.shape)}
            tensors[f"{name}.absmax"] = torch.ones(-(-value.numel() // 64))
            tensors[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            )
    write_tensors(folder, tensors)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
