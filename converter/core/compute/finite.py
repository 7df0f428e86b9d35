"""How many values of a tensor are NaN or infinite, and whether all are zero, of its bytes as they pass by.

Two looks for a largest integer: a value that is not finite has every bit of its exponent set, so it is larger than all
others as an integer with its sign, or, where it is negative, as one without. Only a block that has one is counted.
"""

from __future__ import annotations

from typing import Any

from converter.core.compute.measures import Measures
from converter.core.tensors.dtypes import DType

_FIRST = {
    DType.BF16: (2, 0x7F80), DType.F16: (2, 0x7C00), DType.F32: (4, 0x7F800000), DType.F64: (8, 0x7FF0000000000000),
    DType.F8_E5M2: (1, 0x7C), DType.F8_E4M3: (1, 0x7F),
}  # fmt: skip
"""Bytes of an element, and the first integer without a sign that stands for no finite number."""


ZEROS = "zeros"
"""A measure: how many values lie in a tensor, or in pieces of it, that are zero everywhere."""


class ValuesSeen:
    """Looks at blocks of one tensor's bytes, which come in order and may cut an element.

    Attributes:
        count: values so far that are not finite.
        zeros: values so far, where all of them are zero; else 0.
    """

    def __init__(self, dtype: DType) -> None:
        self._width, self._first = _FIRST.get(dtype, (0, 0))
        self._rest = b""
        self._values, self._is_zero = 0, True
        self.count = 0

    @property
    def zeros(self) -> int:
        """So many values, where every one is zero, of either sign."""
        return self._values if self._is_zero else 0

    def add(self, block: memoryview) -> None:
        """Look at the next bytes."""
        if not self._width:
            return
        if self._rest:
            missing = self._width - len(self._rest)
            whole, block = self._rest + bytes(block[:missing]), block[missing:]
            self._rest = b""
            if len(whole) < self._width:
                self._rest = whole
                return
            self._look(memoryview(whole))
        end = len(block) // self._width * self._width
        if end < len(block):
            self._rest, block = bytes(block[end:]), block[:end]
        if block:
            self._look(block)

    def _look(self, block: memoryview) -> None:
        import numpy as np

        signed: Any = np.frombuffer(block, dtype=f"<i{self._width}")
        unsigned: Any = signed.view(f"<u{self._width}")
        sign = 1 << (8 * self._width - 1)
        above, below = int(signed.max()), int(unsigned.max())
        self._values += len(signed)
        # Above zero is no value, and below none but a zero with a sign.
        self._is_zero = self._is_zero and above <= 0 and below in (0, sign)
        if above >= self._first or below >= self._first | sign:
            self.count += int(np.count_nonzero((unsigned & (sign - 1)) >= self._first))


def note_kept(data: memoryview, dtype: DType, measures: Measures) -> None:
    """Add to a computed piece's measures what it holds that is not finite, and its zeros, where it is nothing else.

    What is not finite and was not made by the piece's kernel is kept from the inputs.
    """
    found = ValuesSeen(dtype)
    found.add(data)
    if found.zeros:
        measures[ZEROS] = float(found.zeros)
    if found.count:
        measures["nonfinite_kept"] = max(0.0, found.count - measures.get("nonfinite_new", 0.0))
