"""Saves small models of many families with whatever transformers runs it: `save_models.py OUT`. No import of ours.

Beside each folder's weights lies `memory.json`: names and shapes of `state_dict()`.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import transformers  # noqa: E402

SMALL = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "vocab_size": 99, "max_position_embeddings": 64,
    "n_positions": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_labels": 1,
}  # fmt: skip
CLASSES = [
    "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification", "MistralForCausalLM",
    "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
    "Phi3ForCausalLM", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPTNeoXForCausalLM", "OPTForCausalLM",
    "BloomForCausalLM", "FalconForCausalLM", "StableLmForCausalLM", "Olmo2ForCausalLM", "CohereForCausalLM",
    "GraniteForCausalLM", "Glm4ForCausalLM", "Starcoder2ForCausalLM", "BertForSequenceClassification",
    "RobertaForSequenceClassification", "T5ForConditionalGeneration", "BertModel", "LlamaModel",
]  # fmt: skip


def main() -> None:
    for name in CLASSES:
        model_class = getattr(transformers, name)
        config_class = model_class.config_class
        known = {*config_class().to_dict(), *(config_class.attribute_map or {}), "num_labels"}
        model = model_class(config_class(**{k: v for k, v in SMALL.items() if k in known}))
        folder = Path(sys.argv[1]) / name
        model.save_pretrained(folder)
        memory = {n: list(t.shape) for n, t in model.state_dict().items()}
        (folder / "memory.json").write_text(json.dumps(memory))


if __name__ == "__main__":
    main()
