"""What a config says that no loader can follow, seen in the config alone: before names and shapes are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from converter.families import config_types, memory_names
from converter.text import show

_DTYPE = re.compile(
    r"auto|(?:torch\.)?(?:b?float16|float|float32|float64|half|double|float[468]_\w+|u?int\d+|bool|complex\w+)",
    re.ASCII,
)
_EPSILON = re.compile(r"\w*(?:_eps|epsilon)", re.ASCII)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
PADDED = frozenset(
    {
        "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2",
        "gemma3_text", "glm", "glm4", "gpt_oss", "granite", "hunyuan_v1_dense", "llama", "mistral", "mixtral",
        "nemotron", "olmo", "olmo2", "opt", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
        "seed_oss", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip
"""Model types whose embedding is built with the pad token's row: transformers 5.23 stops where there is none."""


def fault_of(config: Mapping[str, Any]) -> str | None:
    """Why a load of this config stops or builds another class than it names; None where nothing is seen."""
    return next(_faults(config), None)


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if isinstance(value, str) and not _DTYPE.fullmatch(value):
            yield f"{key} is {show(value)}, which torch does not have"
    for key, value in config.items():
        if isinstance(value, str) and _EPSILON.fullmatch(key):
            yield f"{key} is the text {show(value)}, and a number is asked for"
    most = [n for key in _EXPERTS if type(n := config.get(key)) is int and n > 0]
    each = config.get("num_experts_per_tok")
    if most and type(each) is int and each > most[0]:
        yield f"num_experts_per_tok is {each}, and there are {most[0]} experts"
    rows, pad = config.get("vocab_size"), config.get("pad_token_id")
    if config.get("model_type") in PADDED and type(rows) is int and type(pad) is int and pad >= rows:
        yield f"pad_token_id is {pad}, and vocab_size is {rows}: the embedding has no such row, and is not built"
    names, kind = config.get("architectures"), config.get("model_type")
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if named is None or config.get("auto_map"):
        return
    kinds = _kinds().get(named, frozenset())
    if kinds and (not isinstance(kind, str) or kind not in config_types.kinds()):
        is_told = "is not there" if kind is None else f"is {show(kind)}, which transformers does not know"
        yield f"model_type {is_told}, and {named} is of {_of_that_name(kinds, named)}: AutoModel and every trainer stop"
    if not isinstance(kind, str):
        return
    other = _classes_of(kind)
    if kinds and other and kind not in kinds:
        its = _of_that_name(kinds, named)
        yield (
            f"architectures names {named}, which is of model_type {its}, and model_type is {show(kind)}: "
            f"AutoModel builds {other[0]}"
        )


@cache
def _kinds() -> Mapping[str, frozenset[str]]:
    """Of each class the model types for which transformers' Auto classes build it."""
    found: dict[str, set[str]] = {}
    for classes in memory_names.table()["auto"].values():
        for kind, name in classes.items():
            if isinstance(name, str):
                found.setdefault(name, set()).add(kind)
    return {name: frozenset(kinds) for name, kinds in found.items()}


def _of_that_name(kinds: frozenset[str], named: str) -> str:
    """The model type that gave a class its name, where others are built of it too."""
    alike = [k for k in kinds if named.lower().startswith(re.sub(r"[-_]", "", k.lower()))]
    return max(alike, key=len, default=min(kinds))


def _classes_of(kind: str) -> list[str]:
    """The classes that transformers' Auto classes build for a model type."""
    found = (classes.get(kind) for classes in memory_names.table()["auto"].values())
    return [name for name in found if isinstance(name, str)]
