"""Heights of row chunks: multiples of 64 at every width, as other heights change the bits of matrix products."""

from __future__ import annotations

import pytest

from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.writer.shard_plan import chunk_rows


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (64, 8192), (1000, 512), (1536, 320), (2880, 128), (3584, 128), (5120, 64), (8191, 64), (8192, 64), (8193, 64),
        (11008, 64), (14336, 64), (16384, 64), (28672, 64), (53248, 64), (1 << 20, 64),
    ],
)  # fmt: skip
def test_a_chunk_has_a_multiple_of_64_rows_whatever_the_width(width: int, height: int) -> None:
    stored = tensors.stored(TensorInfo(DType.BF16, (100_000, width)), "/x", 0)
    assert chunk_rows(tensors.cast(stored, DType.F32)) == height


def test_the_height_does_not_depend_on_how_many_rows_there_are() -> None:
    heights = {
        chunk_rows(tensors.cast(tensors.stored(TensorInfo(DType.F32, (rows, 2880)), "/x", 0), DType.F16))
        for rows in (1, 63, 64, 65, 200_000)
    }
    assert heights == {128}
