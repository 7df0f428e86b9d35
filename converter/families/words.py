"""Words that tell what a tensor is, each list once: embeddings, wrappers, LoRA's factors, heads and their files.

A rule that needs a list takes it from here, so that two rules never disagree about what an embedding is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Embeddings

INPUT_MODULES = (
    "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "shared", "word_embedding",
)  # fmt: skip
"""Modules that are an input embedding wherever they stand outside of the layers."""

OUTPUT_MODULES = ("lm_head", "embed_out")
"""Modules that are a language model's output embedding wherever they stand, and nothing else."""

OTHER_OUTPUT_MODULES = (
    "output", "output_layer", "decoder", "predictions", "head", "proj_out", "output_projection", "generator_lm_head",
    "vocab_projector", "lm_loss",
)  # fmt: skip
"""Modules that are an output embedding in some classes, and something else in others: their height has to tell."""

OTHER_INPUT_MODULES = ("embeddings", "embedding")
"""Modules that are an input embedding in some classes, and positions, patches or a whole block in others."""

INPUTS = tuple(f"{module}.weight" for module in INPUT_MODULES)
"""Ends of the names of input embeddings."""

OUTPUTS = tuple(f"{module}.weight" for module in OUTPUT_MODULES)
"""Names of output embeddings, and their ends inside a larger model."""

OUTPUT_PREFIXES = tuple(f"{module}." for module in OUTPUT_MODULES)

INPUT = re.compile(rf"(?:^|\.)(?:{'|'.join(INPUT_MODULES)})\.weight$")
"""A name of an input embedding."""

OUTPUT = re.compile(rf"(?:^|\.)(?:{'|'.join(OUTPUT_MODULES)})\.weight$|^(?:language_model\.|model\.)*output\.weight$")
"""A name of an output embedding."""

NOT_TEXT = ("vision", "visual", "audio", "image", "vqmodel", "codec", "depth_decoder")
"""Words in the names of towers that are not the text model, though they may have embeddings too."""


def is_of_text(name: str) -> bool:
    """True for tensors outside of the layers, and of no other tower than the text model."""
    return not any(word in name for word in NOT_TEXT) and not any(p.isdigit() for p in name.split("."))


def input_embedding(names: Iterable[str]) -> str | None:
    """The text model's input embedding among names as they are stored."""
    held = [n for n in names if is_of_text(n)]
    ends = (INPUTS, tuple(f"{module}.weight" for module in OTHER_INPUT_MODULES))
    return next((n for end in ends for n in held if n.endswith(end) and "position" not in n), None)


DECODER_CLASSES = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of classes that are a decoder with an output embedding."""

CAUSAL_CLASSES = (*DECODER_CLASSES, "ForConditionalGeneration")
"""Ends of the names of classes that generate text and may carry a value head."""

CLASSES_WITH_OUTPUT = (
    *CAUSAL_CLASSES, "DoubleHeadsModel", "ForImageTextToText", "ForMaskedLM", "ForPreTraining", "MTModel",
)  # fmt: skip
"""Ends of the names of classes with an output embedding."""

# Wrappers

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every name of the model that it wraps."""

INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that torch.compile, FSDP and activation checkpointing put anywhere into a name."""

OUTER_WRAPPERS = ("module", "_forward_module")
"""Modules that data-parallel wrappers put before a name; inside a name the words may be the model's own."""

INSIDE = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(INNER_WRAPPERS)})\.")
BEFORE = re.compile(rf"^(?:(?:{'|'.join(OUTER_WRAPPERS)})\.)+")
WRAPPED_CLASS = re.compile(r"^(?:FSDP\d?|DDP|Peft|DistributedDataParallel)+(?=[A-Z])")
"""A class name as wrappers leave it: `FSDPLlamaForCausalLM`."""


def without_wrappers(name: str) -> str:
    """A name without what compilers and data-parallel wrappers put into it."""
    if any(wrapper in name for wrapper in INNER_WRAPPERS):
        name = INSIDE.sub("", name)
    before = BEFORE.match(name)
    return name if before is None else name[before.end() :]


# LoRA

LORA_PAIR = ("lora_A", "lora_B")
LORA_EMBEDDING_PAIR = ("lora_embedding_A", "lora_embedding_B")
LORA_MATRICES = (*LORA_PAIR, *LORA_EMBEDDING_PAIR)
LORA_MAGNITUDE = "lora_magnitude_vector"
LORA_FACTORS = (*LORA_MATRICES, LORA_MAGNITUDE)
"""What PEFT calls the tensors of a LoRA layer."""

LORA_MATRIX_WORD = "|".join(LORA_MATRICES)
LORA_FACTOR_WORD = "|".join(LORA_FACTORS)
"""Alternatives of a regular expression."""

SAVED_WHOLE = "modules_to_save"
IN_PEFT = (SAVED_WHOLE, "base_layer", "original_module")
"""Modules that PEFT puts around what it adapts or copies."""

# Heads

CLASSIFIERS = ("score", "classifier")
"""Modules of transformers' own classification heads."""

CLASSIFIER_WEIGHT = re.compile(rf"^(?:{'|'.join(CLASSIFIERS)})\.(?:out_proj\.)?weight$")
"""Names of the last layer of transformers' own classification heads."""

VALUE_HEADS = ("v_head", "value_head")
"""Modules that trainers call their value heads."""

HEAD_MODULES = (*CLASSIFIERS, *VALUE_HEADS, "reward_head", "score_head", "rm_head")
"""Modules of reward and value heads."""

HEAD_FILES = ("value_head.safetensors", "value_head.bin", "value_head.pt")
"""Files with a head alone, beside the model or adapter that it belongs to; the first that is there counts."""

BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias")
"""Ends of the names of buffers that older versions saved, and that no class needs."""

OLD_BUFFERS = (
    *BUFFERS, ".attention.bias", ".position_ids", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached",
)  # fmt: skip
"""Buffers that older versions of transformers saved, and that a model computes by itself."""
