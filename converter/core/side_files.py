"""Which files travel with the weights: an allow-list. Nothing that runs, nothing that belongs to a training run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.core.checkpoint import SideFile
from converter.core.files.names import ADAPTER_CONFIG, ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZERS
from converter.core.files.opening import Identity, identity, open_input
from converter.core.files.strict_json import load_json, parse_json
from converter.errors import Refused
from converter.text import show

_TOKENIZER = re.compile(
    "|".join(map(re.escape, (*TOKENIZERS, SPECIAL_TOKENS, ADDED_TOKENS))) + r"|vocab\.(json|txt|bpe)"
    r"|merges\.txt|[\w.-]+\.spm|tekken\.json|normalizer\.json|[\w.-]*\.model(\.v\d[\w.]*)?|[\w.-]+\.tiktoken|sentencepiece\.[\w.]*model|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja|chat_templates/[\w.-]+\.jinja"
)
_OTHER = re.compile(
    r"generation_config\.json|preprocessor_config\.json|processor_config\.json|video_preprocessor_config\.json"
    r"|image_processor_config\.json|feature_extractor_config\.json"
    r"|(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY|Notice)([.-][\w.-]{0,40})?"
)
_CODE = re.compile(r"[A-Za-z_][\w.-]*\.py", re.ASCII)
MAX_TOKENIZER_BYTES = 200_000_000
_FOLDERS = ("additional_chat_templates", "chat_templates")


def is_tokenizer_file(name: str) -> bool:
    """True for files that make up a tokenizer; a set of them belongs together."""
    return _TOKENIZER.fullmatch(name) is not None


def travels(name: str, *, keep_code: bool) -> bool:
    """True for files that travel with the weights."""
    return any(p.fullmatch(name) for p in (_TOKENIZER, _OTHER)) or (keep_code and _CODE.fullmatch(name) is not None)


def side_json(files: Mapping[str, SideFile], name: str) -> dict[str, Any]:
    """A JSON object among the files that travel with the weights; empty where there is none of that name.

    Raises:
        Refused: it is no JSON, or too large (see `converter.core.files.strict_json`).
    """
    file = files.get(name)
    if file is None or (file.source is None and file.content is None):
        return {}
    if file.content is not None:
        value = parse_json(file.content, where=name, allow_nan=True)
    else:
        value = load_json(Path(file.source or ""), limit=MAX_TOKENIZER_BYTES, allow_nan=True)
    return value if isinstance(value, dict) else {}


def find_side_files(root: Path, *, keep_code: bool) -> tuple[dict[str, SideFile], dict[str, Identity]]:
    """The files beside the weights that travel with them, and their identities.

    Args:
        keep_code: `.py` files too; they are copied, never imported.

    Raises:
        Refused: an allowed name that is a link out of the folder or no regular file (see `open_input`).
    """
    names = [p.name for p in sorted(root.iterdir()) if not p.is_dir()]
    for folder in _FOLDERS:
        if (root / folder).is_dir():
            names += [f"{folder}/{p.name}" for p in sorted((root / folder).iterdir())]
    files: dict[str, SideFile] = {}
    identities: dict[str, Identity] = {}
    for name in names:
        if travels(name, keep_code=keep_code):
            path = _checked(root / name, root)
            files[name] = SideFile(source=path)
            identities[path] = identity(path)
    return files, identities


def _checked(path: Path, root: Path) -> str:
    os.close(open_input(path, root=root))
    return str(path.absolute())


def adapter_first(base: Mapping[str, SideFile], adapter: Mapping[str, SideFile]) -> dict[str, SideFile]:
    """The base's side files, with the adapter's tokenizer as a whole where it brings one: sets are not mixed."""
    brings = any(is_tokenizer_file(n) and not n.startswith(("chat_template", *_FOLDERS)) for n in adapter)
    kept = {n: f for n, f in base.items() if not (brings and is_tokenizer_file(n))}
    return kept | {n: f for n, f in adapter.items() if is_tokenizer_file(n) or n not in kept}


def recorded(files: Mapping[str, SideFile]) -> dict[str, Any] | None:
    """The `adapter_config.json` that lies by the shards, if one does."""
    file = files.get(ADAPTER_CONFIG)
    if file is None or file.source is None:
        return None
    value = load_json(Path(file.source))
    if not isinstance(value, dict):
        raise Refused("json-malformed", "the adapter config is no JSON object", where=show(file.source))
    return value
