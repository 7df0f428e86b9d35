"""Every architecture of transformers, as small as its config allows: real classes, real `save_pretrained`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

MOST = 30_000_000
"""Parameters of the largest model that is built."""

TASKS: dict[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seqcls": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "tokcls": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "multimodal": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "images": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "bare": modeling_auto.MODEL_MAPPING_NAMES,
}
"""Auto classes by a word: the class of each model type."""

_SIZES: dict[tuple[str, ...], int] = {
    ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "model_dim", "out_hidden_size", "projection_dim"): 32,
    ("vision_hidden_size", "text_embed_dim", "word_embed_proj_dim"): 32,
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"): 2,
    ("num_decoder_layers", "expand", "type_vocab_size", "num_experts_per_tok", "moe_topk", "n_group"): 2,
    ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"): 4,
    ("decoder_attention_heads", "cross_attention_heads", "decoder_n_points"): 4,
    ("num_key_value_heads", "eos_token_id"): 2,
    ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"): 48,
    ("d_kv", "head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"): 8,
    ("state_size", "ssm_state_size", "mamba_d_state"): 8,
    ("vocab_size", "audio_vocab_size"): 99,
    ("max_position_embeddings", "n_positions"): 64,
    ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"): 4,
    ("moe_intermediate_size", "shared_expert_intermediate_size"): 16,
    ("kv_lora_rank", "q_lora_rank", "embedding_size", "sliding_window"): 16,
    ("topk_group", "first_k_dense_replace", "bos_token_id"): 1,
    ("image_size",): 28,
    ("patch_size",): 14,
    ("num_channels",): 3,
    ("pad_token_id",): 0,
}
_SMALL = {name: value for names, value in _SIZES.items() for name in names}


class NotTinyError(Exception):
    """This model type can't be made small by these words, or needs a library that is not here."""


def settings(config: Any, depth: int = 0) -> dict[str, Any]:
    """What to give a config class for a small model; the same for the configs inside of it."""
    fields = set(getattr(config, "__dataclass_fields__", {})) | set(inspect.signature(config.__init__).parameters)
    found: dict[str, Any] = {k: v for k, v in _SMALL.items() if k in fields}
    try:
        whole = config()
    except Exception:
        inside = {k: v for k, v in (getattr(config, "sub_configs", None) or {}).items() if k in fields}
    else:
        named = [k for k in getattr(config, "sub_configs", None) or {} if getattr(whole, k, None) is not None]
        inside = {k: type(getattr(whole, k)) for k in named if k in fields}
        for name, value in found.items():
            if isinstance(given := getattr(whole, name, None), list | tuple):
                found[name] = type(given)([value] * len(given))
    for name, each in inside.items():
        if depth < 3 and getattr(each, "model_type", None):
            found[name] = settings(each, depth + 1) | {"model_type": each.model_type}
    return found


def build(task: str, kind: str, *, seed: int = 0, **more: Any) -> Any:
    """A small model of a type, in training's middle: every parameter has moved off what it began with.

    Raises:
        NotTinyError: the type needs more than small numbers, or is too large all the same.
    """
    entry = TASKS[task][kind]
    try:
        config_class = transformers.CONFIG_MAPPING[kind]
        labels = {"num_labels": 1} if task in ("seqcls", "tokcls") else {}
        config = config_class(**(settings(config_class) | labels | more))
        model_class = getattr(transformers, entry if isinstance(entry, str) else entry[0])
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(config).parameters())
        if count > MOST:
            raise NotTinyError(f"{kind} has {count} parameters")
        torch.manual_seed(seed)
        model = model_class(config)
    except Exception as error:
        raise NotTinyError(f"{kind}: {error}") from error
    moved(model, seed)
    return model


def moved(model: Any, seed: int = 0) -> None:
    """A step of training, in effect: zeros and ones that parameters began with are gone, buffers stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02)


def everything() -> list[tuple[str, str]]:
    """Every auto class with every model type that it has."""
    return [(task, kind) for task, kinds in TASKS.items() for kind in kinds]
