"""The difference of two models, as `make-delta` writes it: `delta_config.json` and `delta*.safetensors`."""

from __future__ import annotations

import re
from pathlib import Path

from converter.core.checkpoint import DELTA, Checkpoint
from converter.core.files.names import DELTA_CONFIG, DELTA_STEM
from converter.core.files.opening import read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.formats.safetensors_io import read_index
from converter.core.formats.weight_file import WeightFile, read_weights
from converter.errors import Refused
from converter.sources.hf.source import (
    compare_index,
    identities_of,
    lazy,
    origin,
    parse_config,
    shared_metadata,
    stored_path,
)
from converter.sources.survey import Fault, SourceKind, StoredTensor, Survey, file_names
from converter.text import fold, show

WEIGHTS = f"{DELTA_STEM}.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_SHARD = re.compile(rf"{DELTA_STEM}-\d{{5}}-of-\d{{5}}\.safetensors", re.ASCII)


class DeltaSource:
    """A difference of two models."""

    name = "delta"
    kind: SourceKind = "delta"
    precedence = 5
    """Before models and adapters: what lies beside `delta_config.json` is what it says."""

    def detect(self, root: Path) -> str | None:
        """Why a folder is a difference, or None."""
        return f"{DELTA_CONFIG} is there" if DELTA_CONFIG in file_names(root) else None

    def survey(self, root: Path) -> Survey:
        """Weight files, tensors and faults; content never raises."""
        survey = Survey(root)
        try:
            found = _read(root)
        except Refused as error:
            survey.faults.append(Fault.of(error))
            return survey
        for name, weights in found.items():
            survey.files[name] = weights.size
            path = stored_path(root, name)
            survey.entries |= {n: StoredTensor(t, path) for n, t in weights.tensors.items()}
        if WEIGHTS not in found:
            compare_index(read_index(root / INDEX, root=root), survey, show(root / INDEX))
        return survey

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The difference, by its headers.

        Raises:
            Refused: broken or missing files, each named.
        """
        survey = self.survey(root)
        if (error := survey.error()) is not None:
            raise error
        found = _read(root)
        config_bytes = read_limited(root / DELTA_CONFIG, limit=MAX_JSON_BYTES, root=root)
        indexes = [INDEX] if WEIGHTS not in found and INDEX in file_names(root) else []
        return Checkpoint(
            tensors=lazy(survey),
            config=parse_config(config_bytes, root / DELTA_CONFIG),
            origin=origin(DELTA, root, asked, revision, found),
            shards={n: Path(e.file).name for n, e in survey.entries.items()},
            config_bytes=config_bytes,
            metadata=shared_metadata(found.values()),
            inputs=identities_of(root, [DELTA_CONFIG, *indexes])
            | {stored_path(root, n): w.identity for n, w in found.items()},
            stem=DELTA_STEM,
        )


def _read(root: Path) -> dict[str, WeightFile]:
    """Headers of the weight files, in order.

    Raises:
        Refused: files are missing (`weights-missing`, `shard-missing`) or broken.
    """
    names = file_names(root)
    if WEIGHTS in names:
        files = [WEIGHTS]
    elif INDEX in names:
        files = sorted(set(read_index(root / INDEX, root=root).weight_map.values()))
        if missing := [f for f in files if f not in names or not _SHARD.fullmatch(f)]:
            raise Refused("shard-missing", f"files that {INDEX} lists are not there: {fold(missing)}", where=show(root))
    else:
        raise Refused("weights-missing", f"{DELTA_CONFIG} is there and {WEIGHTS} is not", where=show(root))
    return {name: read_weights(root / name, root=root, named=stored_path(root, name)) for name in files}


SOURCE = DeltaSource()
