"""Hugging Face model folders: config.json with safetensors, whole or sharded.

The headers are the truth, the index is a claim.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from converter.core.checkpoint import Checkpoint, Origin
from converter.core.files.names import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_PICKLED,
    MODEL_WEIGHTS,
    PICKLED_INDEX,
)
from converter.core.files.opening import Identity, identity, read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES, parse_json
from converter.core.formats.safetensors_io import Index, read_index
from converter.core.formats.weight_file import WeightFile, read_weights
from converter.core.side_files import find_side_files
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.ties import find_ties
from converter.families.words import PEFT_PREFIX, without_wrappers
from converter.sources import survey as folder
from converter.sources.hf import set_files
from converter.sources.hf.adapter_alone import holds_adapter_alone
from converter.sources.hf.sidecars import checks_beside, identities_beside, read_sidecars, tensors_beside
from converter.sources.survey import (
    Fault,
    SourceKind,
    StoredTensor,
    Survey,
    file_names,
    folder_kind,
    leftovers,
    snapshot_of,
)
from converter.text import fold, show

WEIGHTS = MODEL_WEIGHTS
INDEX = MODEL_INDEX
CONFIG = MODEL_CONFIG
_PEFT = re.compile(rf"^{re.escape(PEFT_PREFIX)}(?=.*\.\w+\.)")
_AGAIN = "download or copy the folder again"


class HfSource:
    """A model in transformers' format."""

    name = "hf"
    kind: SourceKind = "model"

    def detect(self, root: Path) -> str | None:
        """Why a folder is a Hugging Face model, or None."""
        names = file_names(root)
        kind = folder_kind(names)
        if kind == "model" and not holds_adapter_alone(root, names):
            found = sorted(n for n in names if folder.is_weights_of_model([n]))
            return f"{show(found[0])} is there"
        if kind is None and CONFIG in names and not _holds_checkpoints(root):
            return f"{CONFIG} is there"
        return None

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
        _refuse_other_weights(config, root)
        side_files, identities = find_side_files(root, keep_code=keep_code)
        ties = ties_of(survey.entries, config)
        kept, shared = without_shared(lazy(survey), ties)
        return Checkpoint(
            tensors=kept,
            config=config,
            origin=origin("model", root, asked, revision, headers, survey.beside),
            side_files=side_files,
            ties=ties,
            shards={n: os.path.basename(survey.entries[n].file) for n in kept} if is_safetensors(headers) else {},
            config_bytes=config_bytes,
            metadata=shared_metadata(headers.values()),
            dropped=shared,
            checks=(*(check for h in headers.values() for check in h.checks), *checks_beside(survey)),
            inputs=identities
            | identities_of(root, [CONFIG, *(n for n in _indexes_read(headers) if (root / n).is_file())])
            | {stored_path(root, n): h.identity for n, h in headers.items()}
            | identities_beside(root, survey),
            beside=tensors_beside(survey),
        )


def _holds_checkpoints(root: Path) -> bool:
    """True for a run's folder: it has a config of its own, and the weights are in folders below."""
    return any(folder_kind(file_names(p)) for p in root.iterdir() if p.is_dir())


def ties_of(names: Iterable[str], config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Tied names, which wrappers and LoRA may have changed: as they are stored."""
    plain = {_PEFT.sub("", without_wrappers(n)).replace(".base_layer.", "."): n for n in names}
    return tuple(tuple(plain.get(n, n) for n in group) for group in find_ties(plain, config))


def stored_path(root: Path, name: str) -> str:
    """The absolute path that nodes and identities name a file by; a file that is a link keeps its own name."""
    return str(root.resolve() / name)


def identities_of(root: Path, names: Iterable[str]) -> dict[str, Identity]:
    """The identities of files in a folder, by absolute path."""
    return {stored_path(root, name): identity(root / name) for name in names}


def lazy(survey: Survey) -> dict[str, LazyTensor]:
    """Every tensor of a survey as stored bytes."""
    return {name: e.tensor for name, e in survey.entries.items()}


def without_shared(
    tensors: Mapping[str, LazyTensor], ties: Iterable[tuple[str, ...]]
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tied names that a pickled file stores as one tensor, kept once as safetensors does; and what was left out."""
    kept, shared = dict(tensors), {}
    for group in ties:
        first, *rest = [n for n in group if n in kept] or [""]
        for name in rest:
            if kept[name] == kept[first]:
                shared[name] = f"shares its memory with {first}"
                del kept[name]
    return kept, shared


def is_safetensors(files: Iterable[str]) -> bool:
    """True where files can keep their tensors and names in an output."""
    return all(name.endswith(".safetensors") for name in files)


def _indexes_read(files: Collection[str]) -> list[str]:
    """Index files that say which of these files belong together; a single whole file needs none."""
    if WEIGHTS in files or MODEL_PICKLED in files:
        return []
    return [INDEX if is_safetensors(files) else PICKLED_INDEX]


def shared_metadata(headers: Iterable[WeightFile]) -> dict[str, str]:
    """What the `__metadata__` of all files agree on: the rest belongs to one file, and files are laid out anew."""
    found = [h.metadata for h in headers]
    return {k: v for k, v in found[0].items() if all(m.get(k) == v for m in found)} if found else {}


def origin(
    kind: str,
    root: Path,
    asked: str,
    revision: str | None,
    headers: Mapping[str, WeightFile],
    beside: Mapping[str, WeightFile] | None = None,
) -> Origin:
    """Where a folder came from; a Hub snapshot is named by its repository."""
    digest = hashlib.sha256()
    for header in (*headers.values(), *(beside or {}).values()):
        digest.update(header.description)
    real = root.resolve()
    name, commit = snapshot_of(root) or (real.name, revision)
    return Origin(
        kind, str(real), asked, name, commit, digest.hexdigest(), "safetensors" if is_safetensors(headers) else "torch"
    )


def parse_config(raw: bytes, path: Path) -> dict[str, Any]:
    """A config file's object.

    Raises:
        Refused: not a JSON object (`json-malformed`).
    """
    value = parse_json(raw, where=str(path), allow_nan=True)
    if not isinstance(value, dict):
        raise Refused("json-malformed", "the config is no JSON object", where=show(path))
    return value


def _refuse_other_weights(config: Mapping[str, Any], root: Path) -> None:
    """A config can name other weights for transformers 5 to read; what lies under the usual name is another model."""
    named = config.get("transformers_weights")
    if named not in (None, WEIGHTS, INDEX):
        raise Refused(
            "weights-elsewhere",
            f"{CONFIG} says that the weights are in {show(named)}, which is not read",
            where=show(root),
            expected=f"{WEIGHTS} or {INDEX}",
        )


def read_folder(root: Path, *, every: bool = False) -> tuple[Survey, dict[str, WeightFile]]:
    """Headers of all weight files of a model folder, in order, and every fault.

    Where several sets of weight files lie there, those of the one that is the model; see `set_files`.

    Args:
        every: look at pickled sets too where what loaders read is sound.
    """
    survey, headers = _read(root)
    names = file_names(root)

    def read(file: str) -> WeightFile:
        return headers[file] if file in headers else read_weights(root / file, root=root, named=stored_path(root, file))

    choice = set_files.choose(root, names, survey, read, every=every)
    if choice is None:
        return survey, headers
    survey.faults = [set_files.told_of(f, choice.sets) for f in survey.faults]
    if choice.chosen is not None:
        of_sets = frozenset(choice.headers) | {f for f in names if folder.SHARD.fullmatch(f)}
        survey, headers = _read(root, choice.chosen.files, also=of_sets)
        survey.faults = [f for f in survey.faults if f.code != "tensor-twice"]
    if choice.fault is not None:
        survey.faults.append(choice.fault)
    survey.sets = tuple(each.set for each in choice.sets)
    return survey, headers


def _read(root: Path, chosen: tuple[str, ...] = (), also: Collection[str] = ()) -> tuple[Survey, dict[str, WeightFile]]:
    """One set of weight files: that which transformers reads, or the chosen one; `also` is told of elsewhere."""
    survey = Survey(root)
    headers: dict[str, WeightFile] = {}
    where = show(root)
    try:
        names = file_names(root)
        if CONFIG not in names:
            advice = f"copy {CONFIG} of the base model there; a reward model's names its own class, and 1 label"
            survey.faults.append(
                Fault(code="config-missing", severity="error", text=f"there is no {CONFIG}", where=where, next=advice)
            )
        files, index = (list(chosen), None) if chosen else _weight_files(root, names, survey)
        for file in files:
            try:
                headers[file] = read_weights(root / file, root=root, named=stored_path(root, file))
            except Refused as error:
                survey.faults.append(Fault.of(error))
        _collect(root, headers, survey)
        if index is not None and len(headers) == len(set(index.weight_map.values())):
            compare_index(index, survey, show(root / _indexes_read(headers)[0]))
        if files and len(headers) == len(files) and not survey.entries:
            survey.faults.append(
                Fault(code="no-tensors", severity="error", text="the weight files hold no tensor", where=where)
            )
        empty = [n for n, e in survey.entries.items() if e.info.shape == (0,)]
        if empty:
            survey.faults.append(folder.empty_tensors(empty, survey.entries, where))
        if ADAPTER_CONFIG in names:
            text = f"{ADAPTER_CONFIG} lies beside a whole model: transformers will look for an adapter here"
            survey.faults.append(Fault(code="adapter-config-stray", severity="cosmetic", text=text, where=where))
        read_sidecars(root, names, survey)
        survey.faults += leftovers(root, names, {*files, WEIGHTS, *survey.beside, *also})
    except Refused as error:
        survey.faults.append(Fault.of(error))
    except OSError as error:
        survey.faults.append(Fault(code="input-unreadable", severity="error", text=f"{error.strerror}", where=where))
    return survey, headers


def _weight_files(root: Path, names: frozenset[str], survey: Survey) -> tuple[list[str], Index | None]:
    """The files that transformers would read, in order, and what the index claims of them."""
    numbered = sorted((n for n in names if folder.SHARD.fullmatch(n)), key=_natural)
    if WEIGHTS in names:
        if INDEX in names or numbered:
            text = f"{WEIGHTS} and sharded files lie side by side; transformers reads {WEIGHTS}, and so does this"
            survey.faults.append(Fault(code="stale-shards", severity="cosmetic", text=text, where=show(root)))
        return [WEIGHTS], None
    if INDEX in names:
        return _indexed(root, names, INDEX, survey)
    if numbered:
        return _numbered(root, numbered, survey), None
    if MODEL_PICKLED in names:
        return [MODEL_PICKLED], None
    if PICKLED_INDEX in names:
        return _indexed(root, names, PICKLED_INDEX, survey)
    survey.faults.append(_no_weights(root, names))
    return [], None


def _indexed(root: Path, names: frozenset[str], file: str, survey: Survey) -> tuple[list[str], Index]:
    """The shards that an index lists; those that are missing are a fault."""
    index = read_index(root / file, root=root)
    files = sorted(set(index.weight_map.values()), key=_natural)
    missing = [f for f in files if f not in names or not (root / f).exists()]
    if missing:
        lost = sum(1 for f in index.weight_map.values() if f in missing)
        text = f"{len(missing)} of {len(files)} shards are missing ({fold(missing)}), and {lost} tensors with them"
        survey.faults.append(Fault(code="shard-missing", severity="error", text=text, where=show(root), next=_AGAIN))
    return [f for f in files if f not in missing], index


def _natural(name: str) -> list[tuple[int, str]]:
    """Order of shards: by number where their names have numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name, flags=re.ASCII)]


def _numbered(root: Path, names: list[str], survey: Survey) -> list[str]:
    """Shards without an index: their names say how many there should be."""
    matches = [m for n in names if (m := folder.SHARD.fullmatch(n))]
    total, width = max(int(m[2]) for m in matches), len(matches[0][1])
    numbers = [int(m[1]) for m in matches]
    where = show(root)
    if {int(m[2]) for m in matches} != {total} or len(set(numbers)) != len(numbers) or max(numbers) > total:
        text = f"there is no {INDEX}, and the shards belong to different sets: {fold(names)}"
        survey.faults.append(Fault(code="shard-missing", severity="error", text=text, where=where, next=_AGAIN))
    elif len(numbers) != total:
        gone = [f"model-{i:0{width}d}-of-{total:0{width}d}.safetensors" for i in _absent(numbers, total)]
        text = f"there is no {INDEX}, and {total - len(numbers)} of {total} shards are missing: {', '.join(gone)}"
        survey.faults.append(Fault(code="shard-missing", severity="error", text=text, where=where, next=_AGAIN))
    else:
        text = f"{INDEX} is missing, without which transformers can't load this; all {total} shards are here"
        survey.faults.append(
            Fault(code="index-missing", severity="cosmetic", text=text, where=where, next="an output gets a new one")
        )
    return names


def _absent(numbers: list[int], total: int, most: int = 3) -> list[int]:
    """The first numbers up to `total` that are not there; a name may claim any total, so not all are counted out."""
    present = set(numbers)
    return [i for i in range(1, min(total, len(present) + most) + 1) if i not in present][:most]


def _no_weights(root: Path, names: frozenset[str]) -> Fault:
    pickled = sorted(n for n in names if folder.PICKLED.fullmatch(n))
    if pickled:
        return Fault(
            code="pickled-weights",
            severity="error",
            text=f"the weights are in {fold(pickled)}, which is not a name that transformers reads",
            where=show(root),
            next=f"name a whole file {MODEL_PICKLED}, or restore {PICKLED_INDEX}",
            facts=(("file", pickled[0]),) if len(pickled) == 1 else (),
        )
    return Fault(
        code="weights-missing", severity="error", text=f"there is neither {WEIGHTS} nor {INDEX}", where=show(root)
    )


def _collect(root: Path, headers: Mapping[str, WeightFile], survey: Survey) -> None:
    for file, header in headers.items():
        survey.files[file] = header.size
        if header.wrapped_in:
            survey.wrapped[file] = header.wrapped_in
        path = stored_path(root, file)
        for name, tensor in header.tensors.items():
            if name in survey.entries:
                other = Path(survey.entries[name].file).name
                text = f"{show(name)} is in {show(other)} and in {show(file)}"
                survey.faults.append(Fault(code="tensor-twice", severity="error", text=text, where=show(root)))
                continue
            survey.entries[name] = StoredTensor(tensor, path)


def compare_index(index: Index, survey: Survey, where: str) -> None:
    """The index against the headers: what it promises must be there; what it forgets is found all the same."""
    claims = index.weight_map
    phantom = [n for n in claims if n not in survey.entries]
    if phantom:
        files = fold(list(dict.fromkeys(claims[n] for n in phantom)))
        text = f"the index lists {len(phantom)} tensors that no shard holds: {fold(phantom)} (said to be in {files})"
        survey.faults.append(Fault(code="index-phantom", severity="error", text=text, where=where, next=_AGAIN))
    homes = {n: os.path.basename(e.file) for n, e in survey.entries.items()}
    moved = [n for n, f in claims.items() if homes.get(n, f) != f]
    if moved:
        first = f"{show(moved[0])} is in {show(homes[moved[0]])}, not in {show(claims[moved[0]])}"
        text = f"the index places {len(moved)} tensors in other shards than they are in: {fold(moved)}; {first}"
        survey.faults.append(Fault(code="index-conflict", severity="error", text=text, where=where, next=_AGAIN))
    unlisted = [n for n in survey.entries if n not in claims]
    if unlisted:
        text = f"{len(unlisted)} tensors are in the shards and not in the index: {fold(unlisted)}; they are kept"
        survey.faults.append(Fault(code="index-unlisted", severity="cosmetic", text=text, where=where))
    claimed, total = index.metadata.get("total_size"), sum(e.info.nbytes for e in survey.entries.values())
    if claimed is not None and claimed != total:
        text = f"the index says total_size {show(claimed)}; the tensors have {total} bytes"
        survey.faults.append(Fault(code="index-total-size", severity="cosmetic", text=text, where=where))


SOURCE = HfSource()
