"""A base model of which the config and the tokenizer are here, and no weights: all that a run with weights needs.

`hf download NAME --exclude "*.safetensors"` leaves such a folder, with the index of files that were not downloaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from converter.core.checkpoint import MODEL, Checkpoint, Origin
from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from converter.core.files.opening import read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.side_files import find_side_files
from converter.sources.hf.source import identities_of, parse_config
from converter.sources.survey import file_names, is_weight_file, snapshot_of

CONFIG_ALONE = "config.json alone"
"""The stored format of such a model."""


def holds_config_alone(root: Path) -> bool:
    """True where a folder has a model's config and no file of weights: an index without its files is none."""
    names = file_names(root)
    is_config = MODEL_CONFIG in names and ADAPTER_CONFIG not in names
    return is_config and not any(is_weight_file(n) for n in names)


def open_config(root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
    """A model without a tensor: its config and its side files.

    Raises:
        Refused: the config is malformed (`json-malformed`).
    """
    raw = read_limited(root / MODEL_CONFIG, limit=MAX_JSON_BYTES, root=root)
    side_files, identities = find_side_files(root, keep_code=keep_code)
    real = root.resolve()
    name, commit = snapshot_of(root) or (real.name, revision)
    return Checkpoint(
        tensors={},
        config=parse_config(raw, root / MODEL_CONFIG),
        origin=Origin(MODEL, str(real), asked, name, commit, hashlib.sha256(raw).hexdigest(), CONFIG_ALONE),
        side_files=side_files,
        config_bytes=raw,
        inputs=identities | identities_of(root, [MODEL_CONFIG]),
    )
