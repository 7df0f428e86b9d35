"""ColossalChat's folders: config and tokenizer at the top, weight files in `modeling/`.

Source: `booster.save_model(model, os.path.join(save_dir, "modeling"), shard=True)`,
https://github.com/hpcaitech/ColossalAI/blob/main/applications/ColossalChat/examples/training_scripts/train_rm.py
"""

from __future__ import annotations

from pathlib import Path

from converter.core.checkpoint import Checkpoint
from converter.core.files.opening import read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.side_files import find_side_files
from converter.sources.hf.source import (
    CONFIG,
    identities_of,
    is_safetensors,
    lazy,
    origin,
    parse_config,
    read_folder,
    shared_metadata,
    stored_path,
)
from converter.sources.survey import SourceKind, Survey, file_names, is_weights_of_model

FOLDER = "modeling"


class ModelingSource:
    """A model whose weights are in `modeling/`, with its config above or beside them."""

    name = "modeling"
    kind: SourceKind = "model"

    def detect(self, root: Path) -> str | None:
        """Why a folder is ColossalChat's, or None."""
        inside = root / FOLDER
        if is_weights_of_model(file_names(root)) or not inside.is_dir():
            return None
        return f"weight files are in {FOLDER}/" if is_weights_of_model(file_names(inside)) else None

    def survey(self, root: Path) -> Survey:
        """Weight files, tensors and faults; content never raises."""
        survey, _ = read_folder(root / FOLDER)
        if CONFIG in file_names(root):
            survey.faults = [f for f in survey.faults if f.code != "config-missing"]
        return survey

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint, by its headers.

        Raises:
            Refused: broken or missing files, each named.
        """
        error = self.survey(root).error()
        if error is not None:
            raise error
        inside = root / FOLDER
        survey, headers = read_folder(inside)
        home = root if CONFIG in file_names(root) else inside
        config_bytes = read_limited(home / CONFIG, limit=MAX_JSON_BYTES, root=home)
        side_files, identities = find_side_files(root, keep_code=keep_code)
        return Checkpoint(
            tensors=lazy(survey),
            config=parse_config(config_bytes, home / CONFIG),
            origin=origin("model", root, asked, revision, headers),
            side_files=side_files,
            shards={n: Path(e.file).name for n, e in survey.entries.items()} if is_safetensors(headers) else {},
            config_bytes=config_bytes,
            metadata=shared_metadata(headers.values()),
            checks=tuple(check for h in headers.values() for check in h.checks),
            inputs=identities
            | identities_of(home, [CONFIG])
            | {stored_path(inside, n): h.identity for n, h in headers.items()},
            subfolder=FOLDER,
        )


SOURCE = ModelingSource()
