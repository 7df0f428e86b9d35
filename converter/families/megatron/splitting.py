"""How megatron-core splits a tensor over tensor-parallel ranks, by its name: of both directions of the old format.

Source: the classes of layers in https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/tensor_parallel
and transformer/ there.
"""

from __future__ import annotations

import re
from typing import Literal

from converter.core.tensors.nodes import LazyTensor, concat, narrow

Way = Literal["rows", "columns", "halves", "copies"]
"""`halves`: rows of each half, gate and up. `copies`: every rank has all of it."""

_ROWS = re.compile(
    r".*(?:word_embeddings\.weight|linear_qkv\.(?:weight|bias)|linear_q_proj\.weight|linear_q_up_proj\.weight|"
    r"linear_kv_up_proj\.weight|core_attention\.softmax_offset|eh_proj\.weight)",
    re.ASCII,
)
_COLUMNS = re.compile(r".*(?:linear_proj|linear_fc2)\.weight", re.ASCII)
_HALVES = re.compile(r".*linear_fc1\.(?:weight|bias)", re.ASCII)


def way(name: str) -> Way:
    """How a tensor is split. An output layer is split by rows where it is one of a vocabulary, which no name tells."""
    if _ROWS.fullmatch(name):
        return "rows"
    if _COLUMNS.fullmatch(name):
        return "columns"
    return "halves" if _HALVES.fullmatch(name) else "copies"


def joined(parts: list[LazyTensor], how: Way) -> LazyTensor:
    """The whole tensor of what each rank has; of copies the first."""
    if how == "copies" or len(parts) == 1:
        return parts[0]
    if how != "halves":
        return concat(parts, 0 if how == "rows" else 1)
    half = parts[0].info.shape[0] // 2
    return concat([narrow(p, 0, start, half) for start in (0, half) for p in parts], 0)


def split(tensor: LazyTensor, how: Way, ranks: int) -> list[LazyTensor]:
    """What each rank has.

    Raises:
        ValueError: the ranks do not divide it.
    """
    if how == "copies" or ranks == 1:
        return [tensor] * ranks
    dim = 1 if how == "columns" else 0
    length = tensor.info.shape[dim] // (2 if how == "halves" else 1)
    if length % ranks:
        raise ValueError(f"{length} of dimension {dim} are not divided by {ranks} ranks")
    step = length // ranks
    if how != "halves":
        return [narrow(tensor, dim, n * step, step) for n in range(ranks)]
    return [concat([narrow(tensor, 0, start + n * step, step) for start in (0, length)], 0) for n in range(ranks)]
