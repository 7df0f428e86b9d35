"""PEFT adapter folders: adapter_config.json with adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path

from converter.core.checkpoint import Checkpoint
from converter.core.files.names import ADAPTER_CONFIG, ADAPTER_PICKLED, ADAPTER_WEIGHTS
from converter.core.files.opening import read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.formats.weight_file import WeightFile, read_weights
from converter.core.side_files import find_side_files
from converter.errors import Refused, UsageError
from converter.sources import survey as folder
from converter.sources.hf.adapter_alone import FSDP, holds_adapter_alone
from converter.sources.hf.mlx_adapter import MLX_WEIGHTS, as_peft, is_of_mlx
from converter.sources.hf.sidecars import checks_beside, identities_beside, read_sidecars, tensors_beside
from converter.sources.hf.source import identities_of, lazy, origin, parse_config, stored_path
from converter.sources.hub.names import as_reference
from converter.sources.survey import Fault, SourceKind, StoredTensor, Survey, file_names, folder_kind, leftovers
from converter.text import show

WEIGHTS = ADAPTER_WEIGHTS
PICKLED = ADAPTER_PICKLED
CONFIG = ADAPTER_CONFIG


class PeftSource:
    """An adapter in PEFT's format."""

    name = "peft"
    kind: SourceKind = "adapter"

    def detect(self, root: Path) -> str | None:
        """Why a folder is an adapter, or None."""
        names = file_names(root)
        if folder_kind(names) != "adapter":
            return f"{FSDP} holds an adapter and nothing else" if holds_adapter_alone(root, names) else None
        return f"{next(n for n in (CONFIG, WEIGHTS, PICKLED) if n in names)} is there"

    def survey(self, root: Path) -> Survey:
        """The adapter's tensors and faults; content never raises."""
        return _read(root)[0]

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The adapter, by its header.

        Raises:
            UsageError: a folder with adapters below it and none in it (`several-checkpoints`).
            Refused: no config, no or pickled weights, empty tensors, a broken file.
        """
        _refuse_run_folder(root, asked)
        survey, found = _read(root)
        error = survey.error()
        if error is not None or found is None:
            raise error or Refused("weights-missing", f"{WEIGHTS} is not there", where=show(root))
        name, weights = found
        config_bytes = read_limited(root / CONFIG, limit=MAX_JSON_BYTES, root=root)
        config = parse_config(config_bytes, root / CONFIG)
        is_foreign = is_of_mlx(config)
        side_files, identities = find_side_files(root, keep_code=keep_code)
        return Checkpoint(
            tensors=lazy(survey),
            config=as_peft(config, show(root / CONFIG)) if is_foreign else config,
            origin=origin("adapter", root, asked, revision, {name: weights}, survey.beside),
            side_files=side_files,
            shards=dict.fromkeys(survey.entries, WEIGHTS) if name == WEIGHTS else {},
            config_bytes=None if is_foreign else config_bytes,
            metadata=weights.metadata,
            checks=(*weights.checks, *checks_beside(survey)),
            inputs=identities
            | identities_of(root, [CONFIG])
            | {stored_path(root, name): weights.identity}
            | identities_beside(root, survey)
            | {stored_path(root, n): f.identity for n, f in survey.unread.items()},
            beside=tensors_beside(survey),
            unread={n: f.tensors for n, f in survey.unread.items()},
        )


def _refuse_run_folder(root: Path, asked: str) -> None:
    names = file_names(root)
    if folder_kind(names) is not None or holds_adapter_alone(root, names):
        return
    below = [p for each in sorted(root.iterdir()) if each.is_dir() for p in (each, each / "adapter") if p.is_dir()]
    found = [p for p in below if folder_kind(file_names(p)) == "adapter"]
    if found:
        asked = as_reference(asked)
        listed = ", ".join(show(f"{asked.rstrip('/')}/{p.relative_to(root)}") for p in found[-8:])
        what = f"there is no adapter in this folder, and {len(found)} below it; name one of them"
        raise UsageError("several-checkpoints", what, where=show(asked), expected=listed)


def _read(root: Path) -> tuple[Survey, tuple[str, WeightFile] | None]:
    survey = Survey(root)
    where = show(root)
    names = file_names(root)
    if CONFIG not in names:
        text = f"there is no {CONFIG}: rank and alpha are unknown"
        next_step = f"copy {CONFIG} from the training run's folder into it"
        survey.faults.append(
            Fault(code="adapter-config-missing", severity="error", text=text, where=where, next=next_step)
        )
    found = _choose(root, names, survey)
    if found is not None:
        _collect(root, *found, survey)
    read_sidecars(root, names, survey, adapter=True)
    if folder.is_weights_of_model(names - survey.beside.keys() - ({found[0]} if found else set())):
        text = "an adapter and a whole model lie in one folder; transformers takes it for the adapter, and so does this"
        survey.faults.append(Fault(code="adapter-and-model", severity="cosmetic", text=text, where=where))
    read = {WEIGHTS, PICKLED, *survey.beside, *([found[0]] if found else ())}
    _read_others(root, names, read, survey)
    survey.faults += leftovers(root, names, read)
    return survey, found


def _read_others(root: Path, names: frozenset[str], read: set[str], survey: Survey) -> None:
    """Weight files that may be a part of what was trained; a whole model beside an adapter is something else."""
    for name in folder.other_weights(names, read):
        if folder.is_weights_of_model([name]) or name.endswith(".gguf"):
            continue
        try:
            file = read_weights(root / name, root=root, named=stored_path(root, name))
        except Refused:
            continue
        if file.tensors:
            survey.unread[name] = file


def _choose(root: Path, names: frozenset[str], survey: Survey) -> tuple[str, WeightFile] | None:
    """The adapter's weights: safetensors, as PEFT prefers; the pickled file where that is empty or missing.

    OpenRLHF up to 0.5.5 wrote an empty adapter_model.safetensors under ZeRO-3, and the gathered weights beside it.
    """
    candidates = [n for n in (WEIGHTS, PICKLED) if n in names] or [n for n in (MLX_WEIGHTS,) if n in names]
    if not candidates and holds_adapter_alone(root, names):
        candidates = [FSDP]
        text = f"{FSDP} holds the adapter, under a name that PEFT does not read"
        survey.faults.append(Fault(code="adapter-named-otherwise", severity="cosmetic", text=text, where=show(root)))
    if not candidates:
        text = f"{CONFIG} is there and {WEIGHTS} is not"
        survey.faults.append(Fault(code="weights-missing", severity="error", text=text, where=show(root)))
    read: list[tuple[str, WeightFile]] = []
    for name in candidates:
        try:
            read.append((name, read_weights(root / name, root=root, named=stored_path(root, name))))
        except Refused as error:
            if name == WEIGHTS or not read:
                survey.faults.append(Fault.of(error))
                return None
        if read and all(t.info.numel for t in read[-1][1].tensors.values()) and read[-1][1].tensors:
            if len(read) > 1:
                text = f"{WEIGHTS} holds empty tensors and {PICKLED} whole ones: {PICKLED} is used"
                survey.faults.append(Fault(code="adapter-empty-twin", severity="cosmetic", text=text, where=show(root)))
            return read[-1]
    return read[0] if read else None


def _collect(root: Path, name: str, weights: WeightFile, survey: Survey) -> None:
    survey.files[name] = weights.size
    path = stored_path(root, name)
    survey.entries = {n: StoredTensor(t, path) for n, t in weights.tensors.items()}
    empty = [n for n, e in survey.entries.items() if e.info.numel == 0]
    if empty:
        survey.faults.append(folder.empty_tensors(empty, survey.entries, show(root / name)))
    if not survey.entries:
        text = "the file holds no tensor: the adapter was saved from the wrong process or at the wrong time"
        survey.faults.append(Fault(code="adapter-empty", severity="error", text=text, where=show(root / name)))


SOURCE = PeftSource()
