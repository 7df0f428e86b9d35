"""All weights of one part of a verl checkpoint, by their names in memory."""

from __future__ import annotations

from dataclasses import dataclass

from converter.core.tensors.nodes import LazyTensor, Stored
from converter.errors import Refused
from converter.sources.verl.plain_rows import plain_rows
from converter.sources.verl.shards import Piece, Ranks, Value
from converter.text import fold, show


@dataclass(frozen=True)
class Weights:
    """Tensors in the model's order.

    Attributes:
        sharded: names of those that FSDP cut: parameters, not buffers.
        shared: groups of names that are one parameter.
        extra: entries of the model's state that are no tensors.
        order: the ranks of one replica, in the order of their pieces.
    """

    tensors: dict[str, LazyTensor]
    sharded: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    extra: tuple[str, ...]
    order: tuple[int, ...]


def read_weights(ranks: Ranks, *, asked_alone: bool = False) -> Weights:
    """Weights and buffers, in the dtype in which verl kept them.

    Args:
        asked_alone: nothing but config.json says how many ranks there were, where no tensor is a DTensor: what it asks
            for has to be there.

    Raises:
        Refused: files missing (`verl-rank-missing`), of several runs (`verl-mixed`) or malformed.
    """
    files = ranks.files
    if not files.models:
        raise ranks.refuse("verl-rank-missing", "there are no model files of ranks")
    first = min(files.models)
    held = {first: _values(ranks, first)}
    for rank in _one_replica(ranks, held[first]):
        if rank not in held:
            held[rank] = _values(ranks, rank)
    names = list(held[first])
    for rank, values in held.items():
        if values.keys() != held[first].keys():
            other = sorted(values.keys() ^ held[first].keys())
            what = f"{show(files.models[first])} and {show(files.models[rank])} hold different tensors"
            raise ranks.refuse("verl-mixed", f"{what}: {fold(other)}. They are of two runs")
    _expect_equal_replicas(ranks, held)
    found: dict[str, LazyTensor] = {}
    lost: list[str] = []
    extra: list[str] = []
    by_name = {n: {r: v for r, own in held.items() if (v := own[n]) is not None} for n in names}
    plain = {n: only for n, values in by_name.items() if (only := _plain(values))}
    rows = plain_rows(ranks, plain, strict=asked_alone and len(plain) == len(by_name))
    for name, by_rank in by_name.items():
        whole = rows.get(name) or (ranks.whole(name, by_rank, files.models) if by_rank else None)
        if whole is not None:
            found[name] = whole
        elif by_rank:
            lost.append(name)
        else:
            extra.append(name)
    if lost:
        raise _missing(ranks, lost, len(names))
    absent = files.missing(files.models)
    if absent:
        text = f"model files of rank {_numbers(absent)} are missing; another replica has all that was in them"
        ranks.said.append(text)
    sharded = tuple(n for n in names if isinstance(held[first][n], Piece))
    order = _order({r: v for r, own in held.items() if isinstance(v := own.get(sharded[0]), Piece)} if sharded else {})
    return Weights(found, sharded or tuple(found), _shared(held[first]), tuple(extra), order or (first,))


def _expect_equal_replicas(ranks: Ranks, held: dict[int, dict[str, Value | None]]) -> None:
    """Files of other replicas that are here hold the same bits; one that can't be read is not needed.

    Raises:
        Refused: they hold others (`verl-mixed`): of another step, or ranks that went apart.
    """
    files = ranks.files
    for rank in sorted(files.models.keys() - held.keys()):
        try:
            values = _values(ranks, rank)
        except Refused as why:
            ranks.said.append(f"{show(files.models[rank])} is not read ({why.what}): another replica has what is in it")
            continue
        for name, value in values.items():
            equals = (r for r, own in held.items() if isinstance(value, Piece) and _is_place(own.get(name), value))
            if (other := next(equals, None)) is not None and not ranks.is_same(value, held[other][name]):
                what = f"{show(files.models[other])} and {show(files.models[rank])} hold replicas of the same shards"
                raise ranks.refuse(
                    "verl-mixed",
                    f"{what}, and {show(name)} differs: they are of two steps, or the ranks went apart in training",
                    next="move the files of the replica that is not wanted elsewhere",
                )


def _is_place(value: Value | None, piece: Piece) -> bool:
    return isinstance(value, Piece) and (value.shape, value.dim, value.at) == (piece.shape, piece.dim, piece.at)


def _plain(by_rank: dict[int, Value]) -> dict[int, LazyTensor]:
    """What the ranks have of a tensor, where none has a DTensor."""
    found = {r: v for r, v in by_rank.items() if not isinstance(v, Piece)}
    return found if len(found) == len(by_rank) else {}


def _order(pieces: dict[int, Piece]) -> tuple[int, ...]:
    """The ranks of the first replica by their coordinates."""
    chosen = min((p.replica for p in pieces.values()), default=())
    return tuple(sorted((r for r, p in pieces.items() if p.replica == chosen), key=lambda r: pieces[r].at))


def _values(ranks: Ranks, rank: int) -> dict[str, Value | None]:
    file = ranks.files.models[rank]
    state = ranks.open(file)
    if not all(isinstance(n, str) for n in state):
        raise ranks.refuse("verl-malformed", "the file holds no tensors by name", file=file)
    return {n: ranks.value(v, file, n) for n, v in state.items()}


def _one_replica(ranks: Ranks, first: dict[str, Value | None]) -> list[int]:
    """Ranks whose files are needed: all, but of equal replicas those of one; files of others need not be read.

    Raises:
        Refused: without replicas, files of some ranks are missing.
    """
    files = ranks.files
    pieces = [v for v in first.values() if isinstance(v, Piece)]
    counts = {p.pieces for p in pieces}
    (count,) = counts if len(counts) == 1 else (None,)
    if count is not None and 0 < count < files.world and all(r in files.models for r in range(count)):
        # Ranks are laid on the mesh row by row; their own coordinates are checked when the pieces are joined.
        return list(range(count))
    lost = files.missing(files.models)
    if lost and (not pieces or count == files.world):
        raise _missing(ranks, [n for n, v in first.items() if isinstance(v, Piece)] or list(first), len(first))
    return sorted(files.models)


def _missing(ranks: Ranks, lost: list[str], count: int) -> Exception:
    files = ranks.files
    absent = files.missing(files.models)
    if not absent:
        what = f"{len(lost)} of {count} tensors are not whole in the ranks' files: {fold(lost)}"
        return ranks.refuse("verl-sizes", what)
    return ranks.refuse(
        "verl-rank-missing",
        f"model files of rank {_numbers(absent)} of {files.world} are missing: with each, a part of every sharded "
        f"tensor is lost ({len(lost)} of {count}: {fold(lost)})",
        next="copy them from the nodes that wrote them; nothing else holds these values",
    )


def _numbers(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return show(", ".join(map(str, ranks[:16])) + more)


def _shared(values: dict[str, Value | None]) -> tuple[tuple[str, ...], ...]:
    """Names whose pieces are one storage: torch saves a shared parameter once."""
    groups: dict[Stored, list[str]] = {}
    for name, value in values.items():
        local = value.local if isinstance(value, Piece) else value
        if isinstance(local, Stored) and local.info.numel:
            groups.setdefault(local, []).append(name)
    return tuple(tuple(g) for g in groups.values() if len(g) > 1)
