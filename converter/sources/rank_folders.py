"""Ranks that each saved their own slices as a model's folder, side by side: `rank_0/`, `tp_rank_01/`, `mp_rank_00/`.

Such is what a save of a tensor-parallel (DeepSpeed's AutoTP) or FSDP model leaves where every rank calls
`save_pretrained`. No file says what the whole is, so that config.json has to: a tensor is put together where the
ranks' pieces are, together and along one dimension, exactly what the class asks for. Rows of fused tensors
(`qkv_proj`, `gate_up_proj`) may be cut in more than one order, and are refused.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG, rank_in
from converter.core.files.opening import open_input, pread, read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor, Stored
from converter.errors import Refused
from converter.families.expected import Unknown, expected
from converter.families.implied import Shape
from converter.sources.base import Held, TrainingSource
from converter.sources.beside import find_beside
from converter.sources.hf.source import parse_config, read_folder
from converter.sources.survey import file_names, folder_kind
from converter.text import show

CODE = "rank-folders"
_MOST_COMPARED = 1 << 16
_FUSED = re.compile(
    r"qkv|query_key_value|gate_up|c_attn|Wqkv|in_proj|kv_proj_with|kv_b_proj|gate_and_up|wqkv|kv_a_proj"
)
"""Modules whose rows are several matrices': each rank may have a part of each, or a stretch of all."""


def ranks_in(root: Path) -> dict[int, Path]:
    """Models' folders of ranks right below a folder; none where their numbers are not 0 to n."""
    if folder_kind(file_names(root)) is not None:
        return {}
    try:
        below = [p for p in root.iterdir() if p.is_dir()]
    except OSError:
        return {}
    found = {n: p for p in below if (n := rank_in(p.name)) is not None and _is_model(p)}
    return found if len(found) > 1 else {}


def _is_model(folder: Path) -> bool:
    names = file_names(folder)
    return folder_kind(names) == "model" and MODEL_CONFIG in names and ADAPTER_CONFIG not in names


class RankFolders(TrainingSource):
    """A model in as many folders as there were ranks."""

    name = "rank-folders"

    def detect(self, root: Path) -> str | None:
        """Why a folder is of this source, or None; an equal model in each is found when they are opened."""
        found = ranks_in(root)
        return f"models of {len(found)} ranks are in {show(found[min(found)].name)} and beside it" if found else None

    def held(self, root: Path) -> Held:
        """Every tensor, put together of the ranks' pieces.

        Raises:
            Refused: a rank that is not there, tensors that are not the model together (`rank-folders`), or a folder
                that can't be read.
        """
        folders = ranks_in(root)
        world = len(folders)
        absent = [r for r in range(max(folders) + 1) if r not in folders]
        if absent:
            raise _refused(root, f"rank {', '.join(map(str, absent[:8]))} of at least {max(folders) + 1} is not here")
        pieces: dict[str, dict[int, LazyTensor]] = {}
        files: list[str] = []
        for rank, folder in sorted(folders.items()):
            survey, _ = read_folder(folder)
            if (error := survey.error()) is not None:
                raise error
            files += [f"{folder.name}/{n}" for n in survey.files]
            for name, entry in survey.entries.items():
                pieces.setdefault(name, {})[rank] = entry.tensor
        config = _config(folders[0])
        wanted = expected(config)
        if isinstance(wanted, Unknown):
            raise _refused(root, f"{wanted.words}, so that nothing says what the whole is")
        asked = {**wanted.memory, **wanted.saved}
        by_rows = _is_cut_by_rows(pieces, asked)
        made = {n: self._whole(root, n, each, asked, world, by_rows) for n, each in pieces.items()}
        cut = [n for n, by_rank in pieces.items() if made[n] is not by_rank.get(0)]
        said = [f"{len(cut)} of {len(made)} tensors are slices of {world} ranks, together what config.json asks for"]
        return Held(root, files, made, said)

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The same, with the config, the tokenizer and what else lies beside the first rank's weights.

        Raises:
            Refused: see `held`.
        """
        found = super().open(root, asked=asked, revision=revision, keep_code=keep_code)
        beside = find_beside([ranks_in(root)[0]], keep_code=keep_code)
        return dataclasses.replace(
            found,
            config=beside.config,
            side_files=beside.files,
            config_bytes=beside.config_bytes,
            inputs={**found.inputs, **beside.inputs},
        )

    def _whole(
        self,
        root: Path,
        name: str,
        by_rank: Mapping[int, LazyTensor],
        asked: Mapping[str, Shape],
        world: int,
        by_rows: bool,
    ) -> LazyTensor:
        shapes = [t.info.shape for _, t in sorted(by_rank.items())]
        if len(by_rank) != world or len({t.info.dtype for t in by_rank.values()}) != 1:
            what = f"{show(name)} is not in every rank's folder, or of other dtypes"
            raise _refused(root, f"{what}: they are of two saves")
        want = asked.get(name)
        if want is None:
            raise _refused(root, f"{show(name)} is no tensor that config.json asks for")
        if all(s == want for s in shapes):
            if len({content for t in by_rank.values() if (content := _content(t)) is not None}) > 1:
                raise _refused(root, f"{show(name)} is whole in each and differs: they are of two saves")
            return by_rank[0]
        dims = [d for d in range(len(want)) if _fits(shapes, want, d)]
        if len(dims) != 1:
            listed = ", ".join(str(list(s)) for s in shapes[:8])
            raise _refused(root, f"{show(name)} is {listed}, and {list(want)} is asked for")
        if dims == [0] and not by_rows and _FUSED.search(name):
            what = f"{show(name)} has rows of several matrices"
            raise _refused(root, f"{what}, and no file says in what order tensor parallelism cut them")
        return tensors.concat([t for _, t in sorted(by_rank.items()) if t.info.numel], dims[0])


def _is_cut_by_rows(pieces: Mapping[str, Mapping[int, LazyTensor]], asked: Mapping[str, Shape]) -> bool:
    """True where norms and biases are cut too, as FSDP does it: then rows are in the order of ranks everywhere."""
    flat = {n: by_rank for n, by_rank in pieces.items() if len(asked.get(n, ())) == 1 and asked[n][0] > len(by_rank)}
    return bool(flat) and all(t.info.shape != asked[n] for n, by_rank in flat.items() for t in by_rank.values())


def _fits(shapes: list[Shape], want: Shape, dim: int) -> bool:
    """True where these are the stretches of what is wanted along a dimension."""
    if any(len(s) != len(want) for s in shapes):
        return False
    others = {(*s[:dim], *s[dim + 1 :]) for s in shapes}
    return others == {(*want[:dim], *want[dim + 1 :])} and sum(s[dim] for s in shapes) == want[dim]


def _content(tensor: LazyTensor) -> bytes | None:
    """The bytes of a small tensor, by which two saves are told apart; None of a large one."""
    if not isinstance(tensor, Stored) or tensor.info.nbytes > _MOST_COMPARED:
        return None
    path = Path(tensor.file)
    fd = open_input(path, root=path.parent)
    try:
        return pread(fd, tensor.info.nbytes, tensor.offset)
    finally:
        os.close(fd)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CONFIG
    return parse_config(read_limited(path, limit=MAX_JSON_BYTES, root=folder), path)


def _refused(root: Path, what: str) -> Refused:
    return Refused(
        CODE,
        f"each rank saved a folder of its own, and they are not the model together: {what}",
        where=show(root),
        next="copy the folders of all ranks of one save side by side; else resume the run, and save what is gathered",
    )


SOURCE = RankFolders()
