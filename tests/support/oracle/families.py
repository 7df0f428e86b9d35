"""Tiny real models of families whose modules have other names in memory than on disk, and of many that have not."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from oracle.bases import DTYPES, Base, _randomise, quiet, read_tensors, write_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

VOCAB = 163
_TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 1}
_ENCODER = {k: v for k, v in _TEXT.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}


def _config(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**settings)


def _plain(name: str, **more: Any) -> Callable[[], Any]:
    return _config(name, **(_TEXT | more))


def _mllama() -> Any:
    text = {**_TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {
        "hidden_size": 24,
        "attention_heads": 2,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_size": 36,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 48,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    return transformers.MllamaConfig(text_config=text, vision_config=vision)


def _qwen_vl(name: str, **vision: Any) -> Callable[[], Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = {**_TEXT, "rope_parameters": rope}
    return _config(name, text_config=text, vision_config={"depth": 2, "num_heads": 2, "patch_size": 14, **vision})


def _with_vision(name: str, text: str, vision: str, **more: Any) -> Callable[[], Any]:
    return _config(
        name,
        text_config={**_TEXT, "head_dim": 12, "model_type": text},
        vision_config={**_VISION, "model_type": vision},
        **more,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        config: builds the config.
        auto: the class that PEFT is put on, or its auto class.
        targets: what the adapter trains: module names, or a regex over names in memory.
        hub: renames of tensors that `save_pretrained` of a model made from scratch does not write as the Hub has them.
        disk: from a module's name in memory to the one on disk, as pairs of pattern and replacement.
    """

    config: Callable[[], Any]
    targets: tuple[str, ...] | str
    auto: str = "AutoModelForCausalLM"
    hub: tuple[tuple[str, str], ...] = ()
    disk: tuple[tuple[str, str], ...] = ()

    def on_disk(self, key: str) -> str:
        """An adapter key of transformers 5 as transformers 4 had it: under the name on disk."""
        for pattern, replacement in self.disk:
            key = re.sub(pattern, replacement, key)
        return key


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_CLIP = ((r"^vision_tower\.", "vision_tower.vision_model."),)
_LLAVA = (
    (r"model\.model\.language_model\.", "model.language_model.model."),
    (r"model\.model\.(vision_tower|vision_model|multi_modal_projector)", r"model.\1"),
    (r"model\.vision_tower\.(?!vision_model)", "model.vision_tower.vision_model."),
    (r"model\.lm_head", "model.language_model.lm_head"),
)
_QWEN_VL = (
    (r"model\.model\.language_model\.", "model.model."),
    (r"model\.model\.visual", "model.visual"),
)
_VIT = (
    (r"layers\.(\d+)\.attention\.([qkv])_proj", r"encoder.layer.\1.attention.attention.\2_proj"),
    (r"attention\.attention\.q_proj", "attention.attention.query"),
    (r"attention\.attention\.k_proj", "attention.attention.key"),
    (r"attention\.attention\.v_proj", "attention.attention.value"),
    (r"layers\.(\d+)\.attention\.o_proj", r"encoder.layer.\1.attention.output.dense"),
    (r"layers\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"layers\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
)
_EVERYWHERE = r".*\.(q_proj|v_proj|down_proj|fc1|linear_1)"

RENAMED = {
    "llava": Case(
        _with_vision("LlavaConfig", "llama", "clip_vision_model", image_token_index=99),
        _EVERYWHERE + "|lm_head",
        "AutoModelForImageTextToText",
        _CLIP,
        _LLAVA,
    ),
    "paligemma": Case(
        _with_vision("PaliGemmaConfig", "gemma", "siglip_vision_model", image_token_index=99, projection_dim=48),
        _EVERYWHERE,
        "AutoModelForImageTextToText",
        _CLIP,
        _LLAVA,
    ),
    "gemma3": Case(
        _with_vision("Gemma3Config", "gemma3_text", "siglip_vision_model", image_token_index=99, mm_tokens_per_image=4),
        _EVERYWHERE,
        "AutoModelForImageTextToText",
        _CLIP,
        _LLAVA,
    ),
    "mllama": Case(_mllama, _EVERYWHERE + "|lm_head", "AutoModelForImageTextToText", (), _LLAVA),
    "qwen2_vl": Case(
        _qwen_vl("Qwen2VLConfig", embed_dim=24, hidden_size=48),
        r".*\.(q_proj|v_proj|down_proj|qkv|fc1)|lm_head",
        "AutoModelForImageTextToText",
        (),
        _QWEN_VL,
    ),
    "qwen2_5_vl": Case(
        _qwen_vl(
            "Qwen2_5_VLConfig", hidden_size=24, out_hidden_size=48, intermediate_size=36, fullatt_block_indexes=[1]
        ),
        r".*\.(q_proj|v_proj|down_proj|qkv)|lm_head",
        "AutoModelForImageTextToText",
        (),
        _QWEN_VL,
    ),
    "vit": Case(
        _config("ViTConfig", **_VISION | {"image_size": 32, "patch_size": 16}, num_labels=3),
        ("q_proj", "v_proj", "o_proj", "fc1", "fc2"),
        "AutoModelForImageClassification",
        (),
        _VIT,
    ),
    "phimoe": Case(_plain("PhimoeConfig", num_local_experts=4), _ATTENTION, disk=((r"\.mlp\.", ".block_sparse_moe."),)),
    "gpt_neox": Case(
        _config("GPTNeoXConfig", **_ENCODER, tie_word_embeddings=False),
        ("query_key_value", "lm_head"),
        disk=((r"model\.lm_head", "model.embed_out"),),
    ),
}

EXPERTS = {
    "mixtral": Case(_plain("MixtralConfig", num_local_experts=4), _ATTENTION),
    "qwen3_moe": Case(_plain("Qwen3MoeConfig", head_dim=12, **_MOE), _ATTENTION),
    "qwen2_moe": Case(_plain("Qwen2MoeConfig", shared_expert_intermediate_size=20, **_MOE), _ATTENTION),
    "deepseek_v3": Case(
        _plain(
            "DeepseekV3Config",
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ),
}

PLAIN = {
    "phi3": Case(_plain("Phi3Config"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "falcon": Case(
        _config("FalconConfig", **_ENCODER, tie_word_embeddings=False), ("query_key_value", "dense", "dense_h_to_4h")
    ),
    "bloom": Case(
        _config("BloomConfig", vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=4, pad_token_id=0),
        ("query_key_value", "dense", "dense_h_to_4h"),
    ),
    "qwen3": Case(_plain("Qwen3Config", head_dim=12), (*_ATTENTION, *_MLP)),
    "gemma3_text": Case(_plain("Gemma3TextConfig", head_dim=12), (*_ATTENTION, *_MLP)),
    "olmo2": Case(_plain("Olmo2Config"), (*_ATTENTION, *_MLP)),
    "granite": Case(_plain("GraniteConfig"), (*_ATTENTION, *_MLP)),
    "stablelm": Case(_plain("StableLmConfig", num_key_value_heads=4, partial_rotary_factor=0.5), (*_ATTENTION, *_MLP)),
    "cohere": Case(_plain("CohereConfig"), (*_ATTENTION, *_MLP)),
    "phi": Case(_plain("PhiConfig"), ("q_proj", "dense", "fc1", "fc2")),
    "starcoder2": Case(_plain("Starcoder2Config"), ("q_proj", "c_fc", "c_proj")),
    "gpt_bigcode": Case(
        _config("GPTBigCodeConfig", vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64, n_inner=48),
        ("c_attn", "c_proj", "c_fc"),
    ),
    "gpt_neo": Case(
        _config(
            "GPTNeoConfig",
            vocab_size=VOCAB,
            hidden_size=48,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            attention_types=[[["global"], 2]],
            max_position_embeddings=64,
        ),
        ("q_proj", "c_proj", "c_fc"),
    ),
    "mpt": Case(
        _config("MptConfig", vocab_size=VOCAB, d_model=48, n_layers=2, n_heads=4, max_seq_len=64),
        ("Wqkv", "out_proj", "up_proj"),
    ),
    "t5": Case(
        _config("T5Config", vocab_size=VOCAB, d_model=48, d_kv=12, d_ff=83, num_layers=2, num_heads=4),
        ("q", "v", "wi", "wo"),
        "AutoModelForSeq2SeqLM",
    ),
    "bart": Case(
        _config(
            "BartConfig",
            vocab_size=VOCAB,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=83,
            decoder_ffn_dim=83,
        ),
        ("q_proj", "v_proj", "fc1"),
        "AutoModelForSeq2SeqLM",
    ),
    "whisper": Case(
        _config(
            "WhisperConfig",
            vocab_size=VOCAB,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=83,
            decoder_ffn_dim=83,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        ("q_proj", "v_proj", "fc1"),
        "AutoModelForSpeechSeq2Seq",
    ),
    "distilbert": Case(
        _config("DistilBertConfig", vocab_size=VOCAB, dim=48, n_layers=2, n_heads=4, hidden_dim=83, pad_token_id=0),
        ("q_lin", "v_lin"),
        "AutoModel",
    ),
    "deberta_v2": Case(_config("DebertaV2Config", **_ENCODER), ("query_proj", "value_proj"), "AutoModel"),
    "bert": Case(_config("BertConfig", **_ENCODER), ("query", "value", "output.dense"), "AutoModel"),
    "roberta": Case(_config("RobertaConfig", **_ENCODER), ("query", "value", "output.dense"), "AutoModel"),
}

CASES = RENAMED | EXPERTS | PLAIN


@dataclasses.dataclass(frozen=True)
class FamilyBase(Base):
    """A base with the targets of its family's case."""

    @property
    def targets(self) -> Any:
        targets = CASES[self.family].targets
        return targets if isinstance(targets, str) else list(targets)


def make_family(
    path: Path,
    name: str,
    *,
    auto: str | None = None,
    dtype: str = "float32",
    hub: bool = True,
    change: Callable[[Any], None] | None = None,
) -> FamilyBase:
    """Writes a tiny model of a family; with the names of the Hub's checkpoints unless `hub` is False.

    `auto` is the class that is saved, where it isn't the one that PEFT is put on.
    """
    case = CASES[name]
    with quiet():
        config = case.config()
        if change is not None:
            change(config)
        torch.manual_seed(0)
        model = getattr(transformers, auto or case.auto).from_config(config, dtype=torch.float32)
        _randomise(model, 0)
        model = model.to(DTYPES[dtype])
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:  # kept in fp32 whatever the model's dtype
                buffer.data = buffer.data.float()
        model.config.dtype = DTYPES[dtype]
        model.save_pretrained(path)
    if hub and case.hub:
        tensors = read_tensors(path)
        for pattern, replacement in case.hub:
            tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
        write_tensors(path, tensors)
    return FamilyBase(path, name, False, case.auto)


def tie(config: Any) -> None:
    """A change of a config: the head is the embedding, in the text part too."""
    for each in (config, getattr(config, "text_config", config)):
        each.tie_word_embeddings = True


def marked(names: Iterable[str], often: Collection[str]) -> list[Any]:
    """Parameters of a test, those that are not run often marked as slow."""
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in names]
