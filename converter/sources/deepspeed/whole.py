"""A DeepSpeed tag as whole tensors, however the run was split: by data, experts, layers, or within tensors.

With the config and tokenizer that lie beside or above the shards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from converter.core.checkpoint import Checkpoint, Origin
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.families.expected import Unknown, expected
from converter.sources.beside import find_beside
from converter.sources.deepspeed import pipeline, slices
from converter.sources.deepspeed.agreement import expect_one_save, expect_steps_of_one
from converter.sources.deepspeed.files import LAYER, run_folders, slices_in
from converter.sources.deepspeed.layout import expect_states, trained_tensors
from converter.sources.deepspeed.moments_without_zero import plain_moments
from converter.sources.deepspeed.slices import Copy, Joiner
from converter.sources.deepspeed.state import Shards, read_shards
from converter.sources.deepspeed.weights import Weights, described, read_weights, training_dtype
from converter.sources.places import Place
from converter.sources.survey import file_names, name_of
from converter.text import show

KIND = "training"
_MOMENTS: tuple[Literal["exp_avg", "exp_avg_sq"], ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Whole:
    """A tag's whole tensors.

    Attributes:
        shards: the files of the first part, which keeps what was read of all.
        copies: tensors that several ranks saved: name, what is taken, another copy.
        words: how the run was split, as `ZeRO-1, 2 ranks, 2 stages of a pipeline`.
    """

    shards: Shards
    weights: Weights
    copies: tuple[Copy, ...] = ()
    words: str = ""


def read_whole(folder: Path, *, master: bool = False) -> Whole:
    """All weights and persistent buffers of a tag.

    Raises:
        Refused: files missing, mixed or malformed, each named.
    """
    shards = read_shards(folder)
    words = described(shards, shards.stage, shards.ranks)
    if is_pipeline(folder):
        return _pipeline(shards, words, master=master)
    if is_sliced(shards):
        return _slices(shards, words, master=master)
    if shards.experts:
        words = f"{words}, with experts spread over them"
    return Whole(shards, read_weights(shards, master=master), (), words)


def is_pipeline(folder: Path) -> bool:
    """True where the layers of a pipeline have a file each."""
    return any(LAYER.fullmatch(n) for n in file_names(folder))


def is_sliced(shards: Shards) -> bool:
    """True where tensors were split over ranks."""
    claimed = shards.model().get("mp_world_size")
    return len(slices_in(shards.folder)) > 1 or (type(claimed) is int and claimed > 1)


def expect_not_split(shards: Shards, what: str) -> None:
    """Refuse what can be done to a run that was split by data alone.

    Args:
        what: is refused, as `another stage of ZeRO`.

    Raises:
        Refused: it was split otherwise (`zero-pipeline`, `zero-tensor-parallel`, `zero-experts`).
    """
    kinds = (
        (is_pipeline(shards.folder), "zero-pipeline", "layers were spread over the stages of a pipeline"),
        (is_sliced(shards), "zero-tensor-parallel", "tensors were split over ranks"),
        (shards.experts, "zero-experts", "experts were spread over the ranks"),
    )
    for is_so, code, why in kinds:
        if is_so:
            advice = "reshard with --world-size alone, which keeps the split"
            raise shards.refuse(code, f"{why}: {what} can't be made of that", next=advice)


def ranks_in_all(shards: Shards) -> int:
    """How many ranks saved a run, those that split its layers or tensors included."""
    return shards.ranks * max(len(slices_in(shards.folder)), 1)


def _pipeline(first: Shards, words: str, *, master: bool) -> Whole:
    if first.experts:
        raise first.refuse("zero-experts", "experts in the layers of a pipeline are not read")
    found = pipeline.read_pipeline(first)
    held, copies = pipeline.pipeline_weights(found)
    trained: frozenset[str] | None = None
    if first.stage and (master or all(pipeline.lists_shapes(s) for s in found.stages)):
        masters, others = pipeline.pipeline_states(found)
        trained = frozenset(masters)
        copies += others
        for name, tensor in masters.items():
            if name in held and held[name].info.shape != tensor.info.shape:
                raise first.refuse("zero-sizes", f"{show(name)} has one shape in its layer's file, and another here")
            if master:
                held[name] = tensor
            elif name not in held:
                held[name] = tensors.cast(tensor, training_dtype(first, None))
    elif not first.stage:
        pipeline.expect_all_held(found, held)
        if master and not all(t.info.dtype.name == "F32" for t in held.values() if t.info.dtype.is_float):
            raise first.refuse("zero-no-masters", "without ZeRO the optimizer's states are not stored by name")
    count = len(found.stages)
    return Whole(first, Weights(held, trained, (), ()), tuple(copies), f"{words}, {count} stages of a pipeline")


def _slices(first: Shards, words: str, *, master: bool) -> Whole:
    if first.experts or first.stage == 3 or first.universal:
        what = "experts" if first.experts else "a universal checkpoint" if first.universal else "ZeRO-3"
        raise first.refuse("zero-tensor-parallel", f"tensor-parallel ranks with {what} are not read")
    parts = slices.read_slices(first)
    read = [read_weights(s, master=master) for s in parts]
    joiner = joiner_of(first, len(parts))
    buffers = first.model().get("buffer_names")
    copied = frozenset(buffers if isinstance(buffers, list) else ())
    held, copies = _joined(first, joiner, [w.tensors for w in read], copied)
    weights = Weights(held, read[0].trained, read[0].shared, read[0].extra)
    return Whole(first, weights, tuple(copies), f"{words}, {len(parts)} tensor-parallel ranks")


def _joined(
    first: Shards, joiner: Joiner, parts: list[Mapping[str, LazyTensor]], copied: Collection[str] = ()
) -> tuple[dict[str, LazyTensor], list[Copy]]:
    if any(p.keys() != parts[0].keys() for p in parts):
        raise first.refuse("zero-mixed", "tensor-parallel ranks hold tensors of different names")
    held: dict[str, LazyTensor] = {}
    copies: list[Copy] = []
    for name in parts[0]:
        held[name], more = joiner.join(name, [p[name] for p in parts], is_copied=name in copied)
        copies += more
    return held, copies


def joiner_of(first: Shards, count: int) -> Joiner:
    """What is known of how a run's tensors were split."""
    info = first.model().get(slices.INFO)
    recorded = info if isinstance(info, dict) else {}
    config = find_beside(run_folders(first.folder), keep_code=False).config
    wanted = expected(config) if config else None
    implied = {} if wanted is None or isinstance(wanted, Unknown) else {**wanted.memory, **wanted.saved}
    return Joiner(first, count, recorded, implied)


def states_of(folder: Path, which: Literal["exp_avg", "exp_avg_sq"], allow: Collection[str]) -> dict[str, LazyTensor]:
    """One of Adam's moments of every trained parameter, by its name in memory.

    Raises:
        Refused: see `DeepSpeedSource.adam_moments`.
    """
    shards = read_shards(folder)
    if is_pipeline(folder):
        found = pipeline.read_pipeline(shards)
        return pipeline.pipeline_states(found, which)[0]
    if is_sliced(shards):
        parts = slices.read_slices(shards)
        return _joined(shards, joiner_of(shards, len(parts)), [_of_one_save(s, which) for s in parts])[0]
    return _of_one_save(shards, which) if shards.stage else plain_moments(shards, which, allow)


def expect_moments(folder: Path) -> None:
    """What `states_of` refuses of both moments, in less time where there are many ranks.

    Raises:
        Refused: see `states_of`.
    """
    shards = read_shards(folder)
    if is_pipeline(folder) or is_sliced(shards) or shards.experts or shards.universal or not shards.stage:
        for which in _MOMENTS:
            states_of(folder, which, ())
        return
    expect_states(shards, _MOMENTS)
    expect_one_save(shards)


def _of_one_save(shards: Shards, which: Literal["exp_avg", "exp_avg_sq"]) -> dict[str, LazyTensor]:
    found = trained_tensors(shards, which)
    expect_one_save(shards)
    expect_steps_of_one(shards, found)
    return found


def open_chosen(
    chosen: Place, root: Path, *, asked: str, revision: str | None, keep_code: bool, master: bool
) -> Checkpoint:
    """A tag's folder, found at or below `root`, as a checkpoint."""
    whole = read_whole(chosen.folder, master=master)
    shards, found = whole.shards, whole.weights
    beside = find_beside(run_folders(chosen.folder), keep_code=keep_code)
    told = [f"{show(chosen.folder.name)}: {chosen.why}"] if chosen.folder != root else []
    return Checkpoint(
        tensors=found.tensors,
        config=beside.config,
        origin=_origin(whole, chosen.folder, asked, revision),
        side_files=beside.files,
        ties=found.shared,
        config_bytes=beside.config_bytes,
        dropped=dict.fromkeys(found.extra, "it is not a tensor, but state of a module's own"),
        inputs=beside.inputs | shards.inputs,
        checks=tuple(shards.checks),
        said=(*told, *dict.fromkeys(shards.said), *beside.said),
        trained=found.trained,
        copies=whole.copies,
    )


def _origin(whole: Whole, folder: Path, asked: str, revision: str | None) -> Origin:
    real = folder.resolve()
    return Origin(KIND, str(real), asked, name_of(real), revision, whole.shards.digest, whole.words)
