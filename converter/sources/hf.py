"""Hugging Face model folders: config.json with safetensors, whole or sharded. The headers are the truth, the index a claim."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter import tensors
from converter.checkpoint import Checkpoint, Origin
from converter.errors import Refused, fold, show
from converter.files import read_limited
from converter.safetensors_io import Header, read_header, read_index
from converter.side_files import find_side_files
from converter.sources.survey import Fault, StoredTensor, Survey, empty_tensors
from converter.sources.ties import find_ties
from converter.strict_json import MAX_JSON_BYTES, parse_json
from converter.tensors import LazyTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
_PICKLED = re.compile(r"(pytorch_model[\w.-]*|model[\w.-]*|consolidated[\w.-]*)\.(bin|pt|pth)", re.ASCII)


class HfSource:
    """A model in transformers' format."""

    name = "hf"

    def detect(self, root: Path) -> str | None:
        """Why a folder is a Hugging Face model, or None."""
        if not root.is_dir() or (root / "adapter_config.json").is_file():
            return None
        if (root / CONFIG).is_file():
            return "config.json is there"
        found = [p.name for p in root.iterdir() if p.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(p.name)]
        return f"{show(sorted(found)[0])} is there" if found else None

    def survey(self, root: Path) -> Survey:
        """Weight files, tensors and faults; content never raises."""
        return read_folder(root)[0]

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint, by its headers.

        Raises:
            Refused: broken or missing files, each named.
        """
        survey, headers = read_folder(root)
        error = survey.error()
        if error is not None:
            raise error
        config_bytes = read_limited(root / CONFIG, limit=MAX_JSON_BYTES, root=root)
        config = parse_config(config_bytes, root / CONFIG)
        side_files, identities = find_side_files(root, keep_code=keep_code)
        identities |= {str((root / n).absolute()): h.identity for n, h in headers.items()}
        return Checkpoint(
            tensors=lazy(survey),
            config=config,
            origin=origin("model", root, asked, revision, headers),
            side_files=side_files,
            ties=find_ties(survey.entries, config),
            shards={name: Path(e.file).name for name, e in survey.entries.items()},
            config_bytes=config_bytes,
            metadata={k: v for h in headers.values() for k, v in h.metadata.items() if len(h.metadata) <= 64},
            inputs=identities,
        )


def lazy(survey: Survey) -> dict[str, LazyTensor]:
    """Every tensor of a survey as stored bytes."""
    return {name: tensors.stored(e.info, e.file, e.offset) for name, e in survey.entries.items()}


def origin(kind: str, root: Path, asked: str, revision: str | None, headers: Mapping[str, Header]) -> Origin:
    """Where a folder came from; a Hub snapshot is named by its repository."""
    digest = hashlib.sha256()
    for header in headers.values():
        digest.update(header.raw)
    resolved = root.resolve()
    name = resolved.name
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        name = resolved.parent.parent.name.removeprefix("models--").replace("--", "/")
        revision = revision or resolved.name
    return Origin(kind, str(root.absolute()), asked, name, revision, digest.hexdigest(), "safetensors")


def parse_config(raw: bytes, path: Path) -> dict[str, Any]:
    """A config file's object.

    Raises:
        Refused: not a JSON object (`json-malformed`).
    """
    value = parse_json(raw, where=str(path))
    if not isinstance(value, dict):
        raise Refused("json-malformed", "the config is no JSON object", where=show(path))
    return value


def read_folder(root: Path) -> tuple[Survey, dict[str, Header]]:
    """Headers of all weight files of a model folder, in order, and every fault."""
    survey = Survey(root)
    headers: dict[str, Header] = {}
    where = show(root)
    try:
        if not (root / CONFIG).is_file():
            survey.faults.append(Fault("config-missing", "error", "there is no config.json", where))
        files, claims = _weight_files(root, survey)
        for file in files:
            try:
                headers[file] = read_header(root / file, root=root)
            except Refused as error:
                survey.faults.append(_fault(error))
        _collect(root, headers, survey)
        if claims and len(headers) == len(files):
            _compare(claims, survey, show(root / INDEX))
        empty = [n for n, e in survey.entries.items() if e.info.shape == (0,)]
        if empty:
            survey.faults.append(empty_tensors(empty, len(survey.entries), where))
    except Refused as error:
        survey.faults.append(_fault(error))
    except OSError as error:
        survey.faults.append(Fault("input-unreadable", "error", f"{error.strerror}", where))
    return survey, headers


def _fault(error: Refused) -> Fault:
    details = [f"expected {error.expected}"] if error.expected else []
    details += [f"got {error.got}"] if error.got else []
    text = error.what + (f" ({', '.join(details)})" if details else "")
    return Fault(error.code, "error", text, error.where or "", error.next)


def _weight_files(root: Path, survey: Survey) -> tuple[list[str], dict[str, str]]:
    """The files that transformers would read, and what the index claims of them."""
    numbered = sorted(p.name for p in root.iterdir() if _SHARD.fullmatch(p.name))
    if (root / WEIGHTS).exists() or (root / WEIGHTS).is_symlink():
        if (root / INDEX).exists() or numbered:
            text = f"{WEIGHTS} and sharded files lie side by side; transformers reads {WEIGHTS}, and so does this"
            survey.faults.append(Fault("stale-shards", "cosmetic", text, show(root)))
        return [WEIGHTS], {}
    if (root / INDEX).exists():
        index = read_index(root / INDEX, root=root)
        files = sorted(set(index.weight_map.values()))
        missing = [f for f in files if not (root / f).exists()]
        if missing:
            lost = sum(1 for f in index.weight_map.values() if f in missing)
            survey.faults.append(
                Fault(
                    "shard-missing",
                    "error",
                    f"{len(missing)} of {len(files)} shards are missing ({fold(missing)}), and {lost} tensors with them",
                    show(root),
                    next="download or copy the folder again",
                )
            )
        return [f for f in files if f not in missing], index.weight_map
    if numbered:
        return _numbered(root, numbered, survey), {}
    survey.faults.append(_no_weights(root))
    return [], {}


def _numbered(root: Path, names: list[str], survey: Survey) -> list[str]:
    """Shards without an index: their names say how many there should be."""
    counts = {m[2] for n in names if (m := _SHARD.fullmatch(n))}
    total = int(max(counts))
    expected = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, min(total, 100_000) + 1)]
    missing = [n for n in expected if n not in names]
    if len(counts) > 1 or missing:
        text = f"there is no {INDEX}, and the shards are no whole set: {fold(missing) or fold(names)} "
        text += "are missing" if missing else "belong to different sets"
        survey.faults.append(Fault("shard-missing", "error", text, show(root), next="download or copy the folder again"))
    else:
        survey.faults.append(Fault("index-missing", "cosmetic", f"{INDEX} is missing; a new one will be written", show(root)))
    return [n for n in expected if n in names]


def _no_weights(root: Path) -> Fault:
    pickled = sorted(p.name for p in root.iterdir() if _PICKLED.fullmatch(p.name))
    if pickled:
        return Fault(
            "pickled-weights",
            "error",
            f"the weights are pickled ({fold(pickled)}); this version reads safetensors only",
            show(root),
            next="save them with save_pretrained(..., safe_serialization=True)",
        )
    return Fault("weights-missing", "error", f"there is neither {WEIGHTS} nor {INDEX}", show(root))


def _collect(root: Path, headers: Mapping[str, Header], survey: Survey) -> None:
    for file, header in headers.items():
        survey.files[file] = header.file_size
        path = str((root / file).absolute())
        for name, (info, begin, _) in header.tensors.items():
            if name in survey.entries:
                other = Path(survey.entries[name].file).name
                text = f"{show(name)} is in {show(other)} and in {show(file)}"
                survey.faults.append(Fault("tensor-twice", "error", text, show(root)))
                continue
            survey.entries[name] = StoredTensor(info, path, header.data_start + begin)


def _compare(claims: Mapping[str, str], survey: Survey, where: str) -> None:
    """The index against the headers: what it promises must be there; what it forgets is found all the same."""
    phantom = [n for n in claims if n not in survey.entries]
    if phantom:
        text = f"the index lists {len(phantom)} tensors that no shard holds: {fold(phantom)}"
        survey.faults.append(Fault("index-phantom", "error", text, where, next="download or copy the folder again"))
    moved = [n for n, f in claims.items() if n in survey.entries and Path(survey.entries[n].file).name != f]
    if moved:
        text = f"the index places {len(moved)} tensors in other shards than they are in: {fold(moved)}"
        survey.faults.append(Fault("index-conflict", "error", text, where, next="download or copy the folder again"))
    unlisted = [n for n in survey.entries if n not in claims]
    if unlisted:
        text = f"{len(unlisted)} tensors are in the shards and not in the index: {fold(unlisted)}; they are kept"
        survey.faults.append(Fault("index-unlisted", "cosmetic", text, where))


SOURCE = HfSource()
