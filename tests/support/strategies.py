"""Hypothesis strategies: names, shapes, dtypes, headers and JSON that real checkpoints could have."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from converter.core.tensors.dtypes import DType, TensorInfo

PACKED = (DType.F4, DType.F6_E2M3, DType.F6_E3M2)
"""Narrower than a byte: a header holds them only in whole bytes, and torch has no such type."""

_WORDS = ("model", "layers", "0", "11", "mlp", "weight", "bias", "wte", "größe", "层", "a b", "a/b", "x:y")

dtypes = st.sampled_from(DType)
whole_byte_dtypes = st.sampled_from([d for d in DType if d not in PACKED])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensor_names = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=6).map(".".join)
metadata = st.dictionaries(st.text(max_size=8).filter(lambda key: key != "format"), st.text(max_size=12), max_size=3)


@st.composite
def tensor_infos(draw: st.DrawFn) -> TensorInfo:
    """Any dtype and shape that fills whole bytes."""
    dtype = draw(dtypes)
    shape = draw(shapes)
    info = TensorInfo(dtype, shape)
    return info if info.numel * dtype.bits % 8 == 0 else TensorInfo(dtype, (*shape, 8))


tensor_lists = st.dictionaries(tensor_names, tensor_infos(), max_size=8).map(lambda found: list(found.items()))

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
