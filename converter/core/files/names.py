"""Names of the files that a checkpoint consists of, each once: configs, weights, indexes, tokenizers, the receipt."""

from __future__ import annotations

import re

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
DELTA_CONFIG = "delta_config.json"
"""What a folder with a difference of two models has in place of config.json, so that no loader takes it for a model."""
DELTA_STEM = "delta"
LORA_META = "lora_train_meta.json"
"""What verl records of an adapter beside its shards: rank, alpha."""
GENERATION_CONFIG = "generation_config.json"

MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
MODEL_PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

ADAPTER_STEM = "adapter_model"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLED = "adapter_model.bin"

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_MODEL = "tokenizer.model"
VOCABULARY = "vocab.json"
SENTENCE_PIECE = "spiece.model"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TOKENIZERS = (TOKENIZER, TOKENIZER_MODEL, VOCABULARY, SENTENCE_PIECE, TOKENIZER_CONFIG)
"""Files of which a tokenizer has at least one."""

CHAT_TEMPLATE = "chat_template.jinja"

TRAINER_STATE = "trainer_state.json"
"""What transformers' Trainer leaves beside the weights."""

CARD = "README.md"
RECEIPT = "rlhf-convert.json"
"""What this program writes beside every folder that it makes."""

FILES = "files"
"""Key of the receipt: names of weight files mapped to `size` in bytes, `crc32` of the file, and `tensors`, the CRC-32
of each of its tensors; checksums are 8 hexadecimal digits."""

WEIGHTS_WORD = f"model|pytorch_model|{ADAPTER_STEM}"
"""Alternatives of a regular expression: how the names of weight files begin."""

_RANK_FOLDER = re.compile(r"(?:[A-Za-z]{1,24}[_-]?){0,3}?rank[_-]?(\d{1,4})", re.ASCII)


def rank_in(folder: str) -> int | None:
    """The rank that a folder's name says: `rank_0`, `tp_rank_01`, `mp_rank_00`."""
    match = _RANK_FOLDER.fullmatch(folder)
    return int(match[1]) if match is not None else None
