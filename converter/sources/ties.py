"""Which names are one tensor for the model, though perhaps only one of them is stored; told from names and config.

Source: `_tied_weights_keys` and `tie_weights`,
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_utils.py
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_INPUT = re.compile(r"(?:^|.*\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_OUTPUT = ("lm_head.weight", "embed_out.weight", "language_model.lm_head.weight")
_WITH_OUTPUT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")


def find_ties(names: Collection[str], config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Groups of tied names, the input embedding first; at least one of each group is stored.

    Where both sides are stored, the group says that the config ties them; whether they are equal is a question of
    values. A config that is silent ties what is not stored on its own, as transformers 4 and 5 both do.
    """
    if not _has_output(config):
        return ()
    if "shared.weight" in names:
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        output = ("lm_head.weight",) if _ties(config) is not False else ()
        return (("shared.weight", *copies, *output),)
    inputs = [n for n in names if _INPUT.match(n) and "visual" not in n and "vision" not in n]
    stored = [n for n in _OUTPUT if n in names]
    if not inputs and len(stored) == 1 and _ties(config):
        return ((_input_of(names), stored[0]),)
    if len(inputs) != 1 or len(stored) > 1:
        return ()
    flag = _ties(config)
    if flag is False or (flag is None and stored):
        return ()
    return ((inputs[0], stored[0] if stored else _output_of(inputs[0], config)),)


def _has_output(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return True
    return any(isinstance(n, str) and n.endswith(_WITH_OUTPUT) for n in names)


def _ties(config: Mapping[str, Any]) -> bool | None:
    """The config's word: its own, else its text model's; None where it has none."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        value = place.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return None


def _output_of(embedding: str, config: Mapping[str, Any]) -> str:
    if embedding.startswith("language_model.model."):
        return "language_model.lm_head.weight"
    return "embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"


def _input_of(names: Collection[str]) -> str:
    """Where the input embedding would be, in a file that keeps a tie under its output name only."""
    prefix = "model." if any(n.startswith("model.") for n in names) else ""
    return f"{prefix}embed_tokens.weight"
