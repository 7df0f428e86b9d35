"""Narrows of narrows: one that says where the elements are in the file."""

from __future__ import annotations

from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo

WIDE = tensors.stored(TensorInfo(DType.F32, (4, 10)), "/x", 100)


def test_a_narrow_of_a_narrow_begins_where_both_together_do() -> None:
    inner = tensors.narrow(tensors.narrow(WIDE, 1, 2, 6), 1, 1, 3)
    assert inner == tensors.Narrow(WIDE, 1, 3, 3)


def test_rows_of_columns_of_rows_are_the_columns_of_those_rows() -> None:
    found = tensors.rows(tensors.narrow(tensors.rows(WIDE, 1, 4), 1, 4, 2), 1, 3)
    third = tensors.stored(TensorInfo(DType.F32, (2, 10)), "/x", 100 + 2 * 10 * 4)
    assert found == tensors.Narrow(third, 1, 4, 2)


def test_narrows_of_one_row_are_stretches_of_the_file() -> None:
    found = tensors.narrow(tensors.narrow(tensors.rows(WIDE, 2, 3), 1, 3, 5), 1, 1, 2)
    assert found == tensors.stored(TensorInfo(DType.F32, (1, 2)), "/x", 100 + (2 * 10 + 4) * 4)
