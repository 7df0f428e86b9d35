"""Tokenizers that transformers 5 saved, as transformers 4 reads them: the class's name, special tokens, what is added.

tokenizer.json is the same for both and stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from converter.core.checkpoint import Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files.names import TOKENIZER, TOKENIZER_CONFIG
from converter.core.side_files import side_json

_ADD_UNASKED = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"})
"""Classes that put a begin-of-text token first in transformers 4 unless their config says no, whatever tokenizer.json
says; in transformers 5 tokenizer.json decides.
Source: `update_post_processor`, https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/llama/tokenization_llama_fast.py
"""


def with_old_tokenizer(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """The checkpoint with a tokenizer_config.json that transformers 4 reads, and reads alike."""
    value = side_json(checkpoint.side_files, TOKENIZER_CONFIG)
    new = dict(value)
    if new.get("tokenizer_class") == "TokenizersBackend":
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = new.get("extra_special_tokens")
    if isinstance(extra, list):
        del new["extra_special_tokens"]
        have = new.get("additional_special_tokens")
        new["additional_special_tokens"] = [*(have if isinstance(have, list) else []), *extra]
    if "backend" in new and str(new.get("tokenizer_class")).removesuffix("Fast") in _ADD_UNASKED:
        new = _added(side_json(checkpoint.side_files, TOKENIZER)) | new
    if new == value:
        return checkpoint
    context.note("info", "fixed", f"{TOKENIZER_CONFIG}: class and special tokens as transformers 4 reads them")
    content = (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()
    return checkpoint.replace(side_files={**checkpoint.side_files, TOKENIZER_CONFIG: SideFile(content=content)})


def _added(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a tokenizer puts a token before and after a text, by its own template; nothing where it has none."""
    pieces = list(_template(tokenizer.get("post_processor")))
    texts = [n for n, piece in enumerate(pieces) if "Sequence" in piece]
    if not texts:
        return {}
    return {"add_bos_token": texts[0] > 0, "add_eos_token": texts[-1] < len(pieces) - 1}


def _template(processor: object) -> Iterator[Mapping[str, Any]]:
    """The pieces of the template for one text, of a processor or of those in a sequence of them."""
    if not isinstance(processor, dict):
        return
    inside = processor.get("processors")
    for each in inside[:16] if isinstance(inside, list) else ():
        if isinstance(each, dict) and each.get("type") == "TemplateProcessing":
            yield from _template(each)
    single = processor.get("single")
    if processor.get("type") == "TemplateProcessing" and isinstance(single, list):
        yield from (piece for piece in single if isinstance(piece, dict))
