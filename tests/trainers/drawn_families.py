"""Architectures over which adapters are drawn: tiny configs, and what of each an adapter may train.

Read by `draw_adapters.py` under PEFT 0.10 as under that of today; it needs nothing of this project.
"""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BERT = {k: v for k, v in TEXT.items() if not k.startswith("num_key_value")}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip
WHISPER = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config: its config's class, and what it is built with.
        auto: the auto class that saves the base, and the task of PEFT.
        targets: modules that an adapter may train.
        feedforward: those among them whose inputs IA3 scales.
        whole: modules that are often saved whole.
        embedding: the input embedding.
        layers: what `layers_pattern` is called.
        reward: it has a causal model, and a classifier over the same base.
        parameters: stacks of experts, where the class has them.
    """

    config: tuple[str, dict[str, Any]]
    targets: tuple[str, ...]
    feedforward: tuple[str, ...]
    whole: tuple[str, ...]
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    layers: str = "layers"
    auto: str = "AutoModelForCausalLM"
    task: str = "CAUSAL_LM"
    reward: bool = False
    parameters: tuple[str, ...] = ()


def _text(name: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return name, TEXT | more


FAMILIES = {
    "llama": Family(_text("LlamaConfig"), (*ATTENTION, *MLP), ("down_proj",), ("embed_tokens", "lm_head", "norm"),
                    reward=True),
    "llama-tied": Family(_text("LlamaConfig", tie_word_embeddings=True), (*ATTENTION, *MLP), ("down_proj",),
                         ("embed_tokens", "lm_head", "norm")),
    "qwen2": Family(_text("Qwen2Config", tie_word_embeddings=True), (*ATTENTION, *MLP), ("down_proj",),
                    ("embed_tokens", "lm_head", "norm"), reward=True),
    "gemma": Family(_text("GemmaConfig", head_dim=8), (*ATTENTION, *MLP), ("down_proj",), ("embed_tokens", "norm"),
                    reward=True),
    "phi3": Family(_text("Phi3Config"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ("down_proj",),
                   ("embed_tokens", "lm_head", "norm")),
    "gpt2": Family(("GPT2Config", GPT2), ("c_attn", "c_proj", "c_fc"), ("c_fc",), ("wte", "lm_head", "ln_f"), "wte",
                   norms=("ln_1", "ln_2"), layers="h", reward=True),
    "opt": Family(
        ("OPTConfig", {**BERT, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), ("fc2",), ("embed_tokens", "lm_head"),
        norms=("self_attn_layer_norm", "final_layer_norm")),
    "neox": Family(("GPTNeoXConfig", BERT), ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
                   ("dense_4h_to_h",), ("embed_in", "embed_out"), "embed_in", "embed_out"),
    "mixtral": Family(_text("MixtralConfig", num_local_experts=4), ATTENTION, ("o_proj",), ("embed_tokens", "lm_head")),
    "bert": Family(("BertConfig", {**BERT, "num_labels": 3}), ("query", "key", "value", "dense"), ("dense",),
                   ("classifier", "pooler"), "word_embeddings", "classifier", ("LayerNorm",), "layer",
                   "AutoModelForSequenceClassification", "SEQ_CLS"),
    "t5": Family(("T5Config", T5), ("q", "k", "v", "o", "wi", "wo"), ("wo",), ("lm_head",), "",
                 norms=("layer_norm",), layers="block", auto="AutoModelForSeq2SeqLM", task="SEQ_2_SEQ_LM"),
    "whisper": Family(("WhisperConfig", WHISPER), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), ("fc2",),
                      ("proj_out", "embed_tokens"), head="proj_out", norms=("self_attn_layer_norm",),
                      auto="AutoModelForSpeechSeq2Seq", task=""),
    "qwen3": Family(_text("Qwen3Config", head_dim=8), (*ATTENTION, *MLP), ("down_proj",),
                    ("embed_tokens", "lm_head", "norm"), reward=True),
    "qwen3_moe": Family(
        _text("Qwen3MoeConfig", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
              decoder_sparse_step=1, mlp_only_layers=[]),
        ATTENTION, ("o_proj",), ("embed_tokens", "lm_head"),
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    "gpt_oss": Family(
        _text("GptOssConfig", head_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24,
              sliding_window=8, layer_types=["full_attention"] * 2),
        ATTENTION, ("o_proj",), ("embed_tokens", "lm_head"),
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    "falcon": Family(("FalconConfig", {**BERT, "new_decoder_architecture": False, "multi_query": True, "bias": True}),
                     ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), ("dense_4h_to_h",),
                     ("word_embeddings", "lm_head"), "word_embeddings", layers="h"),
    "bloom": Family(("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                                     "pad_token_id": 0}),
                    ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), ("dense_4h_to_h",),
                    ("word_embeddings", "lm_head"), "word_embeddings", layers="h"),
    "llava": Family(
        ("LlavaConfig", {"text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 60,
                         "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "image_size": 16,
                                           "patch_size": 8, "intermediate_size": 48, "num_hidden_layers": 2,
                                           "num_attention_heads": 4, "projection_dim": 32}}),
        (*ATTENTION, *MLP, "linear_1", "fc1"), ("down_proj",), ("embed_tokens", "multi_modal_projector"),
        auto="LlavaForConditionalGeneration"),
    "roberta": Family(
        ("RobertaConfig", {**BERT, "max_position_embeddings": 64, "pad_token_id": 1, "num_labels": 3}),
        ("query", "key", "value", "dense"), ("dense",), ("classifier",), "word_embeddings", "out_proj",
        ("LayerNorm",), "layer", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "bert-tokens": Family(("BertConfig", {**BERT, "num_labels": 3}), ("query", "key", "value"), ("value",),
                          ("classifier",), "word_embeddings", "classifier", ("LayerNorm",), "layer",
                          "AutoModelForTokenClassification", "TOKEN_CLS"),
    "distilbert": Family(
        ("DistilBertConfig", {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
                              "max_position_embeddings": 64, "num_labels": 3}),
        ("q_lin", "k_lin", "v_lin", "lin1", "lin2"), ("lin2",), ("classifier", "pre_classifier"), "word_embeddings",
        "classifier", ("sa_layer_norm",), "layer", "AutoModelForSequenceClassification", "SEQ_CLS"),
    "t5-untied": Family(
        ("T5Config", {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"), ("wo",), ("lm_head",), "", norms=("layer_norm",),
        layers="block", auto="AutoModelForSeq2SeqLM", task="SEQ_2_SEQ_LM"),
    "resnet": Family(("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                       "num_labels": 3, "layer_type": "basic"}),
                     ("convolution",), ("convolution",), ("classifier",), "", "classifier", ("normalization",),
                     "layers", "AutoModelForImageClassification", ""),
    "vit": Family(("ViTConfig", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                                 "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "num_labels": 3}),
                  ("query", "key", "value", "dense"), ("dense",), ("classifier",), "", "classifier",
                  ("layernorm_before",), "layer", "AutoModelForImageClassification", ""),
}  # fmt: skip
