"""Which names are one tensor for the model, though perhaps only one of them is stored; told from names and config.

transformers ties where `config.tie_word_embeddings` says so (each config class has its own default), the head to the
embedding that the class names in `_tied_weights_keys`. On loading it is symmetric: whichever of the two is stored
serves both. Where both are stored transformers 5 ties them only if they are equal, transformers 4 always; headers
can't tell, so the group is listed and the values are a question for `Context.equal`.

Source: `get_expanded_tied_weights_keys` and `tie_weights`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# Embedding and head as they are named on disk, tried in this order; the first whose embedding is stored is the pair.
_PAIRS = (
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight"),
    ("text_model.model.embed_tokens.weight", "text_model.lm_head.weight"),
    ("model.text_model.embed_tokens.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("gpt_neox_japanese.embed_in.weight", "embed_out.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("transformer.tokens_embed.weight", "lm_head.weight"),
    ("transformer.w.weight", "lm_head.weight"),
    ("biogpt.embed_tokens.weight", "output_projection.weight"),
    ("rwkv.embeddings.weight", "head.weight"),
)
_HEAD_OF_TYPE = {"whisper": "proj_out.weight", "moonshine": "proj_out.weight", "trocr": "output_projection.weight"}

# Heads of encoders: what is stored beside the head tells which it is; the head's bias is a second tie.
_WORD_EMBEDDINGS = re.compile(r"(?:\w+\.)?embeddings\.word_embeddings\.weight", re.ASCII)
_MASKED_HEADS = (
    ("cls.predictions.transform.dense.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"),
    ("lm_head.dense.weight", "lm_head.decoder.weight", "lm_head.bias"),
    ("vocab_transform.weight", "vocab_projector.weight", None),
)

_WITH_HEAD = (
    "ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForConditionalGeneration", "ForImageTextToText", "ForMaskedLM",
    "ForPreTraining", "MTModel",
)  # fmt: skip

# The text model's word counts where the outer config has none or says no: saved so before transformers 5.
# Source: `__post_init__` of these config classes in transformers 5.23.
_OUTER_FOLLOWS_TEXT = """
    fast_vlm glm4v glm4v_moe glm_ocr llava llava_next_video llava_onevision minimax_m3_vl paddleocr_vl perception_lm
    qwen2_5_vl qwen2_vl shieldgemma2 vibevoice video_llama_3
"""
OUTER_FOLLOWS_TEXT = frozenset(_OUTER_FOLLOWS_TEXT.split())

# Model types whose config class ties when config.json is silent; all others do not.
# Source: every class of CONFIG_MAPPING in transformers 5.23, built without arguments.
_TIED_BY_DEFAULT = """
    albert aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip
    blip_text_model bloom camembert canary cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text
    convbert cpmant csm ctrl d_fine dab-detr data2vec-text deberta deberta-v2 deepseek_vl deepseek_vl_hybrid
    deformable_detr deimv2 diffusion_gemma diffusion_gemma_text distilbert electra ernie ernie4_5 ernie4_5_moe
    ernie4_5_vl_moe ernie4_5_vl_moe_text esm falcon falcon_mamba flaubert flava florence2 fnet fun_asr_nano
    funnel gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_assistant gemma4_unified_text glmasr got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox_japanese granite_docling granite_docling_text granite_speech granite_speech5_ctc
    granite_speech_plus granite_swa grounding-dino gte hunyuan_vl hunyuan_vl_text hyperclovax_vision_v2 ibert
    internvl janus jetmoe jina_embeddings_v3 kimi_k25 kosmos-2 kosmos-2.5 kosmos_2_5_text_model
    kosmos_2_text_model layoutlm led lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr longformer longt5 luke
    lxmert m2m_100 mamba marian mbart megatron-bert mimi mimi_decoder mimi_encoder minicpm3 minicpm_ocr mistral3
    mm-grounding-dino mobilebert modernbert modernbert-decoder moonshine moss_transcribe_diarize mpnet mpt mra
    mt5 mvp neomme nllb-moe nomic_bert nystromformer openai-gpt opt ovis2 paddleocr_vl paddleocr_vl_text
    paligemma pe_audio_video pegasus pegasus_x plbart pop2piano pp_chart2table pp_doclayout_v3 pp_doclayout_v4
    prophetnet qwen2_5_omni_text qwen3_asr qwen3_vl_moe_text recurrent_gemma roberta roberta-prelayernorm
    roc_bert roformer rt_detr_v2 sam sam_hq seamless_m4t seamless_m4t_v2 shieldgemma2 smollm3 speech_to_text
    speecht5 squeezebert starcoder2 switch_transformers t5 t5_gemma_module t5gemma t5gemma2 t5gemma2_decoder
    t5gemma2_encoder t5gemma2_text tapas trocr udop umt5 vaultgemma vilt visual_bert voxtral_realtime whisper
    xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2 zaya
"""
TIED_BY_DEFAULT = frozenset(_TIED_BY_DEFAULT.split())


def find_ties(names: Collection[str], config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Groups of tied names, the input embedding first; at least one of each group is stored."""
    return tuple(_groups(frozenset(names), config))


def _groups(names: frozenset[str], config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    flag = _ties(config)
    with_head = _has_head(config)
    if "shared.weight" in names:
        # T5: the copies are tied whatever the config says; a head of its own (T5 1.1) goes with `false`.
        copies = [f"{side}.embed_tokens.weight" for side in ("encoder", "decoder") if _any(names, f"{side}.")]
        own_head = "lm_head.weight" in names and flag is False
        yield ("shared.weight", *copies, *(["lm_head.weight"] if with_head and not own_head else []))
        return
    if not with_head or flag is False:
        return
    for embedding, head in _pairs(names, config):
        if flag or head not in names:
            # A silent config and no head: written by code that we don't know, and tied, or the model would not work.
            copies = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
            yield (embedding, *(copies if embedding.endswith("model.shared.weight") else []), head)
        return
    if flag:
        yield from _masked(names)


def _pairs(names: frozenset[str], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The embedding and its head, if names show them: by the embedding, of a bare backbone too, else by the head."""
    special = _HEAD_OF_TYPE.get(str(config.get("model_type")))
    bare = [(embedding.partition(".")[2], head) for embedding, head in _PAIRS]
    for embedding, head in (*_PAIRS, *bare):
        if embedding in names:
            yield embedding, special or head
            return
    for embedding, head in _PAIRS:
        backbone = embedding.rsplit(".", 2)[0]
        if (special or head) in names and (_any(names, f"{backbone}.layers.") or _any(names, f"{backbone}.h.")):
            yield embedding, special or head
            return


def _masked(names: frozenset[str]) -> Iterator[tuple[str, ...]]:
    embedding = next((n for n in sorted(names) if _WORD_EMBEDDINGS.fullmatch(n)), None)
    for witness, head, bias in _MASKED_HEADS:
        if embedding is not None and witness in names:
            yield (embedding, head)
            if bias is not None:
                yield (bias, head.removesuffix("weight") + "bias")
            return


def _any(names: Collection[str], prefix: str) -> bool:
    return any(n.startswith(prefix) for n in names)


def _has_head(config: Mapping[str, Any]) -> bool:
    """True for classes with an output embedding, and where no class is named."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return True
    return any(isinstance(n, str) and n.endswith(_WITH_HEAD) for n in named)


def _ties(config: Mapping[str, Any]) -> bool | None:
    """Whether transformers would tie; None where the config is silent and its type does not tie by default."""
    kind = str(config.get("model_type"))
    own = config.get("tie_word_embeddings")
    text = config.get("text_config")
    if own is not True and kind in OUTER_FOLLOWS_TEXT and isinstance(text, dict):
        own = True if text.get("tie_word_embeddings") is True else own
    if isinstance(own, bool):
        return own
    return True if kind in TIED_BY_DEFAULT else None
