"""Opens a folder in which tensors are empty, cut or missing: for the step that fills them, and for no other.

Every other use of a folder refuses it. Here what is lost stays in the checkpoint as an empty placeholder, shape (0,),
and weight files that transformers and PEFT would not read are listed beside, since one of them may be whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from converter.core.checkpoint import Checkpoint, RecordCheck
from converter.core.files.names import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    PICKLED_INDEX,
)
from converter.core.files.opening import Identity, read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.formats.safetensors_io import read_index
from converter.core.formats.weight_file import WeightFile, read_weights
from converter.core.side_files import find_side_files
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.errors import Refused
from converter.sources.hf import peft, set_files
from converter.sources.hf import source as hf
from converter.sources.hf.sidecars import checks_beside, identities_beside, tensors_beside
from converter.sources.survey import Survey, file_names

LOST = frozenset(
    {"zero3-empty-tensors", "shard-missing", "index-phantom", "no-tensors", "weights-missing", "adapter-empty"}
)
"""Faults that a repair is for. Any other is refused as everywhere."""

OF_FILES = frozenset(
    {"file-truncated", "safetensors-header", "safetensors-not", "header-too-large", "torch-zip", "torch-not",
     "pickle-malformed", "index-malformed", "index-conflict", "tensor-twice", "git-lfs-pointer"}
)  # fmt: skip
"""Faults of one set of weight files, which another may not have."""

_SPARE_MODEL = re.compile(r"(?:pytorch_model|model)[\w.-]*\.(?:bin|safetensors)", re.ASCII)
_SPARE_ADAPTER = re.compile(rf"{ADAPTER_STEM}[\w.-]*\.(?:bin|safetensors)", re.ASCII)


def open_broken(root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
    """A model folder or an adapter with what is left of its tensors.

    Raises:
        Refused: faults that no other file can make good.
    """
    names = file_names(root)
    is_adapter = peft.SOURCE.detect(root) is not None
    survey, headers = _read_adapter(root) if is_adapter else hf.read_folder(root, every=True)
    _refuse_others(survey)
    config_file = ADAPTER_CONFIG if is_adapter else MODEL_CONFIG
    config_bytes = read_limited(root / config_file, limit=MAX_JSON_BYTES, root=root)
    config = hf.parse_config(config_bytes, root / config_file)
    side_files, identities = find_side_files(root, keep_code=keep_code)
    tensors = hf.lazy(survey) | _promised(root, names, survey)
    ties = () if is_adapter else hf.ties_of(tensors, config)
    kept, shared = hf.without_shared(tensors, ties)
    spare, spare_inputs, spare_checks = _spare(root, names, {*headers, *survey.beside}, is_adapter=is_adapter)
    files = {hf.stored_path(root, n): h.identity for n, h in headers.items()}
    return Checkpoint(
        tensors=kept,
        config=config,
        origin=hf.origin("adapter" if is_adapter else "model", root, asked, revision, headers, survey.beside),
        side_files=side_files,
        ties=ties,
        shards=_homes(kept, survey, headers),
        config_bytes=config_bytes,
        metadata=hf.shared_metadata(headers.values()) or {"format": "pt"},
        dropped=shared,
        checks=(*(c for h in headers.values() for c in h.checks), *checks_beside(survey), *spare_checks),
        inputs=identities
        | hf.identities_of(root, [config_file])
        | files
        | identities_beside(root, survey)
        | spare_inputs,
        said=tuple(f.text for f in survey.faults if f.code in (*LOST, "adapter-empty-twin")),
        beside={**tensors_beside(survey), **spare},
        sets=survey.sets,
    )


def _read_adapter(root: Path) -> tuple[Survey, dict[str, WeightFile]]:
    survey = peft.SOURCE.survey(root)
    read = {n: read_weights(root / n, root=root, named=hf.stored_path(root, n)) for n in survey.files}
    return survey, read


def _refuse_others(survey: Survey) -> None:
    sets = next((f for f in survey.faults if f.code == set_files.CODE), None)
    left = [f for f in survey.faults if f.code not in (*LOST, set_files.CODE)]
    error = Survey(survey.root, faults=left).error()
    if error is None:
        return
    if sets is not None and all(f.code in OF_FILES for f in left if f.severity == "error"):
        raise Refused(sets.code, sets.text, where=sets.where, next="copy or download one of the sets again")
    raise error


def _promised(root: Path, names: Iterable[str], survey: Survey) -> dict[str, LazyTensor]:
    """Placeholders for tensors that the index lists and no file holds."""
    index = next((n for n in (MODEL_INDEX, PICKLED_INDEX) if n in names), None)
    chosen = survey.sets and all(f.code == set_files.CODE for f in survey.faults if f.severity == "error")
    if index is None or MODEL_WEIGHTS in names or chosen:
        return {}
    sizes: dict[DType, int] = {}
    for entry in survey.entries.values():
        sizes[entry.info.dtype] = sizes.get(entry.info.dtype, 0) + entry.info.nbytes
    dtype = max(sizes, key=lambda d: sizes[d], default=DType.BF16)
    claimed = read_index(root / index, root=root).weight_map
    return {n: Filled(TensorInfo(dtype, (0,)), 0) for n in claimed if n not in survey.entries}


def _homes(kept: Iterable[str], survey: Survey, headers: Mapping[str, WeightFile]) -> dict[str, str]:
    """The file of each tensor, where the output can keep it."""
    if not headers or not hf.is_safetensors(headers):
        return {}
    return {n: Path(survey.entries[n].file).name for n in kept if n in survey.entries}


def _spare(
    root: Path, names: Iterable[str], read: Collection[str], *, is_adapter: bool
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, Identity], list[RecordCheck]]:
    """Weight files that were not read, by name; those that can't be read are of no use and left out."""
    beside: dict[str, dict[str, LazyTensor]] = {}
    inputs: dict[str, Identity] = {}
    checks: list[RecordCheck] = []
    pattern = _SPARE_ADAPTER if is_adapter else _SPARE_MODEL
    for name in sorted(n for n in names if pattern.fullmatch(n) and n not in read):
        try:
            file = read_weights(root / name, root=root, named=hf.stored_path(root, name))
        except Refused:
            continue
        beside[name] = dict(file.tensors)
        inputs[hf.stored_path(root, name)] = file.identity
        checks += file.checks
    return beside, inputs, checks
