"""The full-precision model that a quantised one was made from, where a name is recorded or follows from one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.core.files.names import CARD
from converter.core.files.opening import open_input, read_exact
from converter.errors import ConvertError

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_QUANTISED = re.compile(
    r"(?:^|[^a-z0-9])(?:bnb|[2348]-?bits?|gptq|awq|fp8|int[48]|w[48]a\d+|(?:mx|nv)fp4|fp4|nf4|gguf|hqq|aqlm|eetq|"
    r"quantized|exl[23])(?:[^a-z0-9]|$)"
)
_ONLY_QUANTISED = re.compile(r"gpt-oss(?!.*bf16)|deepseek-(?:v3|r1)(?!.*(?:distill|bf16))|kimi-k2(?!.*bf16)")
"""Models whose own makers publish them quantised, and in nothing else."""

_UNSLOTH = re.compile(r"(?P<name>unsloth/.+?)(?:-unsloth)?-bnb-4bit", re.IGNORECASE)
_MOST_OF_CARD = 1 << 16


def is_quantised_name(name: str) -> bool:
    """True for a name that says that the model is quantised, or of a model that its makers publish in no other way."""
    lower = name.lower()
    return _QUANTISED.search(lower) is not None or _ONLY_QUANTISED.search(lower) is not None


def full_precision_of(base: Checkpoint, recorded: object = None) -> str | None:
    """The Hub's name of the model that a quantised base was made from; never of one that is quantised itself.

    Args:
        recorded: what the adapter records as its base.
    """
    return full_precision_in(Path(base.origin.path), base.config, (base.origin.name, base.origin.asked), recorded)


def full_precision_in(
    folder: Path, config: Mapping[str, Any], held: tuple[str, ...], recorded: object = None
) -> str | None:
    """The same of a folder with its config.

    Args:
        held: what the folder is called.
    """
    candidates = _candidates(folder, config, held[0], recorded)
    return next((n for n in candidates if n not in held and not is_quantised_name(n)), None)


def _candidates(folder: Path, config: Mapping[str, Any], name: str, recorded: object) -> Iterator[str]:
    yield from _of_card(folder / CARD)
    names = [n for n in (name, recorded, config.get("_name_or_path")) if isinstance(n, str)]
    for name in names:
        if match := _UNSLOTH.fullmatch(name):
            yield match["name"]
    for name in names[1:]:
        if _REPO.fullmatch(name) and not os.path.exists(name):
            yield name


def _of_card(path: Path) -> list[str]:
    """What the front matter of a model card names as `base_model` of a quantised model."""
    from converter.core.files.strict_yaml import read_values

    try:
        fd = open_input(path)
    except (OSError, ConvertError):
        return []
    try:
        size = min(os.fstat(fd).st_size, _MOST_OF_CARD)
        text = read_exact(fd, 0, size, file=str(path)).decode("utf-8", errors="replace")
        front = text.removeprefix("---").split("\n---", 1)[0] if text.startswith("---") else ""
        held: Any = read_values(front.encode(), file=CARD).value if front.strip() else {}
    except (OSError, ConvertError):
        return []
    finally:
        os.close(fd)
    if not isinstance(held, dict) or held.get("base_model_relation", "quantized") != "quantized":
        return []
    named = held.get("base_model")
    names = named if isinstance(named, list) else [named]
    return [n for n in names if isinstance(n, str) and _REPO.fullmatch(n)] if len(names) == 1 else []
