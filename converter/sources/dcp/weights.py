"""The weights of a distributed checkpoint as lazy tensors, with the config and tokenizer beside or above them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.checkpoint import Checkpoint, Origin, RecordCheck
from converter.core.files.opening import Identity, identity
from converter.core.formats.torch_file import read_torch_file, state_dict
from converter.core.tensors.nodes import LazyTensor, Stored
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.families.megatron.names import is_megatron, is_stacked
from converter.sources.base import Held
from converter.sources.beside import find_beside
from converter.sources.dcp import rank_files
from converter.sources.dcp.adapter_names import names_in_memory
from converter.sources.dcp.chunks import Pieces
from converter.sources.dcp.files import full_file, kind_here, optimizer_folder, refusal
from converter.sources.dcp.hf_pieces import WORDS, read_pieces
from converter.sources.dcp.layout import Moment, optimizer_states, reasons, sort_entries
from converter.sources.dcp.metadata import METADATA, Metadata, read_metadata
from converter.sources.deepspeed.files import run_folders
from converter.sources.megatron_files import unfinished
from converter.sources.places import Place
from converter.sources.survey import file_names, snapshot_of
from converter.text import fold, show

KIND = "training"
OPTIMIZER_FILE = "optimizer.bin"


@dataclass(frozen=True)
class Weights:
    """A model's tensors by their names in memory.

    Attributes:
        words: the layout, for screens and the receipt.
        trained: names that the optimizer held; None where that isn't recorded.
        shared: groups of names that are one tensor in the file.
        dropped: entries that are not taken, with the reason.
        ends_recorded: the files say how large each tensor is; else pieces at its end may be missing unnoticed.
    """

    tensors: dict[str, LazyTensor]
    words: str
    digest: str
    trained: frozenset[str] | None
    shared: tuple[tuple[str, ...], ...]
    dropped: Mapping[str, str]
    checks: tuple[RecordCheck, ...]
    inputs: dict[str, Identity]
    said: tuple[str, ...] = ()
    ends_recorded: bool = True


def read_weights(folder: Path) -> Weights:
    """All tensors of the model that a folder holds.

    Raises:
        Refused: a layout that is not read, files missing, cut short or malformed, tensors not whole.
    """
    kind = kind_here(folder)
    if kind == "full":
        return _read_full(folder)
    if kind == "hf-shards":
        read = read_pieces(folder, file_names(folder))
        words = f"{WORDS}, {len(read.inputs)} files"
        return Weights(read.tensors, words, read.digest, None, (), {}, (), read.inputs, ends_recorded=False)
    if kind == "ranks":
        return _read_ranks(folder)
    if kind != "dcp":
        assert kind is not None
        raise refusal(folder, kind)
    metadata = read_metadata(folder)
    entries = sort_entries(metadata)
    pieces = Pieces(metadata)
    if is_stacked(entries.model) or is_megatron(entries.model):
        raise unfinished(folder)
    tensors = pieces.read(entries.model.values())
    found = {name: tensors[key] for name, key in entries.model.items()}
    said = [f"the model is `{show(entries.where)}` in it"] if entries.where else []
    aside = [k for k in entries.others if k in metadata.tensors]
    if aside:
        said.append(f"{len(aside)} tensors beside the model are not taken: {fold([show(k) for k in aside])}")
    held, inputs = _held(folder, metadata, said)
    found = _as_in_memory(found, held, folder, said)
    return Weights(
        found,
        f"torch distributed checkpoint, {_files(pieces)}",
        pieces.digest,
        held & found.keys() or None,
        (),
        reasons(entries),
        tuple(pieces.checks),
        pieces.inputs | inputs,
        tuple(said),
    )


def _files(pieces: Pieces) -> str:
    count = len(pieces.inputs) - 1
    return f"{count} {'file' if count == 1 else 'files'}"


def _held(folder: Path, metadata: Metadata, said: list[str]) -> tuple[frozenset[str], dict[str, Identity]]:
    """Names that an optimizer held, and the file that says so, where it is another one."""
    names = frozenset(optimizer_states(metadata))
    inputs: dict[str, Identity] = {}
    other = optimizer_folder(folder)
    if not names and other is not None:
        try:
            names = frozenset(optimizer_states(readable_metadata(other)))
            inputs[str((other / METADATA).absolute())] = identity(other / METADATA)
        except Refused as error:
            said.append(f"{show(other.name)} can't be read, so which tensors were trained is not known: {error.what}")
    return names, inputs


def readable_metadata(folder: Path) -> Metadata:
    """What `.metadata` says.

    Raises:
        Refused: it is missing (`dcp-metadata-missing`, `dcp-rank-metadata`), and see `read_metadata`.
    """
    kind = kind_here(folder)
    if kind in ("rank-metadata", "no-metadata"):
        raise refusal(folder, kind)
    return read_metadata(folder)


def _as_in_memory(
    found: dict[str, LazyTensor], held: frozenset[str], folder: Path, said: list[str]
) -> dict[str, LazyTensor]:
    names = names_in_memory(found, held, folder)
    if names is None:
        return found
    said.append("only the adapter was saved")
    return {names[n]: t for n, t in found.items()}


def _read_ranks(folder: Path) -> Weights:
    """One file a rank."""
    found, ranks = rank_files.gathered(folder)
    said = [*ranks.files.said, *ranks.said]
    names: frozenset[str] = frozenset()
    try:
        names = rank_files.trained(folder)
    except Refused as error:
        said.append(f"the optimizer's files can't be read, so which tensors were trained is not known: {error.what}")
    tensors = _as_in_memory(dict(found.tensors), names, folder, said)
    words = f"FSDP, one file a rank, {ranks.files.world} {'rank' if ranks.files.world == 1 else 'ranks'}"
    dropped = dict.fromkeys(found.extra, "it is not a tensor, but state of a module's own")
    trained = frozenset(n for group in [*found.shared, *((n,) for n in tensors)] if names & set(group) for n in group)
    shared = found.shared if tensors.keys() == found.tensors.keys() else ()
    checks, inputs = tuple(ranks.checks), ranks.inputs
    return Weights(tensors, words, ranks.digest, trained or None, shared, dropped, checks, inputs, tuple(said))


def _read_full(folder: Path) -> Weights:
    """The one file of FULL_STATE_DICT."""
    path = full_file(folder, file_names(folder))
    read = read_torch_file(path, root=folder)
    found = state_dict(read.value)
    if found is None:
        raise Refused(
            "pickled-not-weights", "the file holds something else than tensors by name", where=show(path),
            expected="what accelerate saves with FULL_STATE_DICT",
        )  # fmt: skip
    inputs = {str(path.absolute()): read.identity}
    said: list[str] = []
    names: frozenset[str] = frozenset()
    if (folder / OPTIMIZER_FILE).is_file():
        try:
            names = frozenset(_full_states(folder))
            inputs[str((folder / OPTIMIZER_FILE).absolute())] = identity(folder / OPTIMIZER_FILE)
        except Refused as error:
            said.append(f"{OPTIMIZER_FILE} can't be read, so which tensors were trained is not known: {error.what}")
    found = _as_in_memory(dict(found), names, folder, said)
    places: dict[LazyTensor, list[str]] = {}
    for name, tensor in found.items():
        if isinstance(tensor, Stored) and tensor.info.numel:
            places.setdefault(tensor, []).append(name)
    shared = tuple(tuple(group) for group in places.values() if len(group) > 1)
    trained = frozenset(n for group in [*shared, *((n,) for n in found)] if names & set(group) for n in group)
    return Weights(
        found, "FSDP, full state dict", read.digest, trained or None, shared, {}, read.checks, inputs, tuple(said)
    )


def _full_states(folder: Path) -> dict[str, dict[str, Any]]:
    """States in the optimizer's one file, by the parameter's name; nothing where it only numbers them."""
    value = read_torch_file(folder / OPTIMIZER_FILE, root=folder).value
    states = value.get("state") if isinstance(value, dict) else None
    if not isinstance(states, dict):
        return {}
    return {n: s for n, s in states.items() if isinstance(n, str) and isinstance(s, dict)}


def open_chosen(chosen: Place, root: Path, *, asked: str, revision: str | None, keep_code: bool) -> Checkpoint:
    """A folder, found at or below `root`, as a checkpoint."""
    found = read_weights(chosen.folder)
    beside = find_beside(run_folders(chosen.folder), keep_code=keep_code)
    told = [f"{show(chosen.folder.name)}: {chosen.why}"] if chosen.folder != root else []
    real = chosen.folder.resolve()
    return Checkpoint(
        tensors=found.tensors,
        config=beside.config,
        origin=Origin(KIND, str(real), asked, _name(real), revision, found.digest, found.words, found.ends_recorded),
        side_files=beside.files,
        ties=found.shared,
        config_bytes=beside.config_bytes,
        dropped=found.dropped,
        inputs=beside.inputs | found.inputs,
        checks=found.checks,
        said=(*told, *found.said, *beside.said),
        trained=found.trained,
    )


def _name(folder: Path) -> str:
    """A name that tells checkpoints apart: accelerate calls every one of its folders the same."""
    if (found := snapshot_of(folder)) is not None:
        return found[0]
    return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("pytorch_model_fsdp_") else folder.name


def expect_masters(found: Checkpoint) -> Checkpoint:
    """The same checkpoint, whose trained tensors are fp32.

    Raises:
        Refused: some are not, and there are no others (`dcp-no-masters`).
    """
    trained = found.trained if found.trained is not None else frozenset(found.tensors)
    low = [n for n, t in found.tensors.items() if n in trained and t.info.dtype.is_float and t.info.dtype.bits < 32]
    if low:
        words = ", ".join(sorted({found.tensors[n].info.dtype.torch_name for n in low}))
        raise Refused(
            "dcp-no-masters",
            f"{len(low)} trained tensors were saved in {words}, and there are no fp32 masters beside them: {fold(low)}",
            where=show(found.origin.asked),
            next=Steps(
                Again(leave_out=("--master",), otherwise=Command("gather", (found.origin.asked, "OUT"))),
                ", without --master: nothing is lost by it",
            ),
        )
    return found


def moments_of(folder: Path, which: Moment) -> dict[str, LazyTensor]:
    """Adam's moments by parameter name, from the model's own folder or from the optimizer's beside it."""
    kind = kind_here(folder)
    found: dict[str, LazyTensor] = {}
    if kind == "full" and (folder / OPTIMIZER_FILE).is_file():
        held = {n: s.get(which) for n, s in _full_states(folder).items()}
        found = {n: t for n, t in held.items() if isinstance(t, LazyTensor)}
    elif kind == "dcp":
        for place in (folder, optimizer_folder(folder)):
            if place is None or found:
                continue
            metadata = readable_metadata(place)
            keys = {n: leaves[which] for n, leaves in optimizer_states(metadata).items() if which in leaves}
            read = Pieces(metadata).read(keys.values())
            found = {n: read[k] for n, k in keys.items()}
    elif kind == "ranks":
        found = rank_files.moments(folder, which)
    elif kind not in (None, "full", "hf-shards"):
        raise refusal(folder, kind)
    if not found:
        raise Refused(
            "dcp-no-moments",
            f"there is no {which} by parameter names: the optimizer was not saved with the model, is not Adam, or "
            "numbers its parameters",
            where=show(folder),
        )
    return found


def held_in(folder: Path) -> Held:
    """Files and tensors of a folder."""
    found = read_weights(folder)
    files = [Path(p).name for p in found.inputs if Path(p).parent == folder.absolute()]
    return Held(folder, files, found.tensors)
