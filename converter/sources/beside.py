"""Config, adapter config, tokenizer and side files that lie beside a trainer's shards or above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.core.checkpoint import SideFile
from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG
from converter.core.files.opening import Identity, identity, read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.side_files import find_side_files, is_tokenizer_file
from converter.sources.hf.source import parse_config
from converter.sources.survey import file_names
from converter.text import show


@dataclass
class Beside:
    """What was found, the nearest of each.

    Attributes:
        files: side files by name, `adapter_config.json` among them.
        inputs: identities of everything found.
        config: `config.json`; empty where there is none.
        config_bytes: the same verbatim.
        said: what was found where, for the user.
    """

    files: dict[str, SideFile] = field(default_factory=dict)
    inputs: dict[str, Identity] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_bytes: bytes | None = None
    said: list[str] = field(default_factory=list)


def find_beside(folders: Sequence[Path], *, keep_code: bool) -> Beside:
    """What makes the weights load, looked for in each folder in turn; the first is that of the shards.

    Raises:
        Refused: a config that is no JSON object, a side file that is a link out of its folder.
    """
    found = Beside()
    for folder in folders:
        where = "beside the shards" if folder == folders[0] else f"above the shards, in {show(folder.name)}"
        names = file_names(folder)
        if MODEL_CONFIG in names and found.config_bytes is None:
            path = folder / MODEL_CONFIG
            found.config_bytes = read_limited(path, limit=MAX_JSON_BYTES, root=folder)
            found.config = parse_config(found.config_bytes, path)
            found.inputs[str(path.absolute())] = identity(path)
            found.said.append(f"{MODEL_CONFIG} found {where}")
        if ADAPTER_CONFIG in names and ADAPTER_CONFIG not in found.files:
            source = str((folder / ADAPTER_CONFIG).absolute())
            found.files[ADAPTER_CONFIG] = SideFile(source=source)
            found.inputs[source] = identity(folder / ADAPTER_CONFIG)
            found.said.append(f"{ADAPTER_CONFIG} found {where}")
        _take_side_files(found, folder, where, keep_code)
    return found


def _take_side_files(found: Beside, folder: Path, where: str, keep_code: bool) -> None:
    """Those that no nearer folder has; a tokenizer is taken from one folder as a whole."""
    own, identities = find_side_files(folder, keep_code=keep_code)
    has_tokenizer = any(is_tokenizer_file(n) for n in found.files)
    new = {n: f for n, f in own.items() if n not in found.files and not (has_tokenizer and is_tokenizer_file(n))}
    if any(is_tokenizer_file(n) for n in new):
        found.said.append(f"tokenizer found {where}")
    found.files |= new
    found.inputs |= {f.source: identities[f.source] for f in new.values() if f.source in identities}
