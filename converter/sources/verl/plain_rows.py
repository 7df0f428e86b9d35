"""Ranks' files that hold plain rows in place of DTensors: no file says what the whole is, so that config.json has to.

A tensor is put together where every rank's file is there and their rows are, together, exactly those that the class of
config.json asks for. Cut by rows is what FSDP does, to norms too; where those are whole the pieces are tensor-parallel,
whose order inside of fused tensors no file tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from converter.core.files.names import MODEL_CONFIG
from converter.core.files.opening import read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.families.disk_names import disk_names
from converter.families.expected import Unknown, expected
from converter.families.implied import Shape
from converter.families.memory_names import architecture
from converter.sources.hf.source import parse_config
from converter.sources.verl.files import HUGGINGFACE
from converter.sources.verl.shards import Ranks
from converter.text import fold, show


def plain_rows(
    ranks: Ranks, plain: Mapping[str, Mapping[int, LazyTensor]], *, strict: bool = False
) -> dict[str, LazyTensor]:
    """Tensors that the ranks' rows make up; empty where every rank has whole ones, or nothing says what is whole.

    Args:
        plain: what each rank has of each tensor, for tensors that are no DTensors.
        strict: the number of ranks is nowhere recorded, so that a tensor of which nothing is asked is not taken.

    Raises:
        Refused: rows that are not those of the model together (`verl-sizes`), or pieces of tensor parallelism
            (`verl-placement`).
    """
    if (ranks.files.world < 2 and not strict) or not plain:
        return {}
    asked = _asked(ranks.folder, plain)
    unknown = [n for n in plain if not asked.get(n)] if strict else []
    if unknown:
        what = f"{len(unknown)} of {len(plain)} tensors are plain rows of ranks, and no config.json beside says"
        raise ranks.refuse("verl-sizes", f"{what} how large the whole is: {fold(unknown)}")
    held = {n: by_rank for n, by_rank in plain.items() if asked.get(n)}
    cut = {n: r for n, r in held.items() if any(t.info.shape != asked[n] for t in r.values())}
    if not cut:
        return {}
    whole = [n for n in held if n not in cut and len(asked[n]) == 1]
    if whole:
        what = f"each rank of {ranks.files.world} has tensor-parallel slices: {fold(cut)} are cut, {fold(whole)} whole"
        raise ranks.refuse("verl-placement", f"{what}. In what order rows of fused tensors were cut no file tells")
    wrong = {n: r for n, r in cut.items() if not _fits(r, asked[n], ranks.files.world)}
    if wrong:
        name, by_rank = next(iter(wrong.items()))
        listed = ", ".join(str(list(t.info.shape)) for _, t in sorted(by_rank.items())[:8])
        what = f"{len(wrong)} of {len(plain)} tensors are not whole in the ranks' files: {fold(wrong)}"
        raise ranks.refuse("verl-sizes", f"{what}; {show(name)} is {listed}, and {list(asked[name])} is asked for")
    ranks.said.append(f"{len(cut)} tensors are plain rows of {ranks.files.world} ranks, together what is asked for")
    return {n: tensors.concat([t for _, t in sorted(r.items()) if t.info.numel], 0) for n, r in cut.items()}


def _fits(by_rank: Mapping[int, LazyTensor], asked: Shape, world: int) -> bool:
    """True where every rank is there, and their rows are as many as are asked for, cut as `torch.chunk` cuts."""
    pieces = [t.info for _, t in sorted(by_rank.items())]
    if sorted(by_rank) != list(range(world)) or len({p.dtype for p in pieces}) > 1:
        return False
    step = -(-asked[0] // world)
    rows = [min(step, max(asked[0] - step * rank, 0)) for rank in range(world)]
    return all(p.shape == (n, *asked[1:]) for p, n in zip(pieces, rows, strict=True))


def _asked(folder: Path, names: Iterable[str]) -> Mapping[str, Shape]:
    """Shapes of these names in memory, by the config beside the shards; empty where its class is unknown."""
    for place in (folder, folder / HUGGINGFACE, folder.parent):
        path = place / MODEL_CONFIG
        if path.is_file():
            config = parse_config(read_limited(path, limit=MAX_JSON_BYTES, root=place), path)
            wanted = expected(config)
            if isinstance(wanted, Unknown):
                return {}
            built = architecture(wanted.name, config)
            stored = {} if built is None else disk_names(names, built)
            shapes = {**wanted.saved, **wanted.memory}
            return shapes | {n: shapes[disk] for n, disk in stored.items() if disk in shapes}
    return {}
