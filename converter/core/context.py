"""What a converter may ask of the world: values of a few tensors, equality of two, the user's consent. No torch.

There is no other way to values at planning time. Every answer is recorded and travels in the plan as evidence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from converter.core.files import sparse
from converter.core.files.opening import open_input, read_exact
from converter.core.tensors.byte_runs import ByteRun, byte_runs, describe
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import Cast, LazyTensor
from converter.diagnostic import Diagnostic, Severity
from converter.errors import Refused
from converter.text import fold

MAX_READ = 1 << 20
"""Bytes that a converter may read of one tensor; more is refused, so that planning stays a matter of headers."""

MAX_COMPUTED = 64
"""Bytes that a converter may have computed of one tensor."""

STREAM_BLOCK = 1 << 22
"""Bytes held of each side while two tensors are compared."""

Note = Diagnostic
"""Something that the user should know of this run; `changes-numbers` says that results may differ from training."""


def _unheard(count: int, tensor: str) -> None:
    """Nothing."""


@dataclass
class Context:
    """What a converter is called with; holds the user's consents and collects notes and evidence.

    Attributes:
        allow: codes that the user consented to with `--allow`.
        notes: printed before the run and kept in the receipt.
        consents: codes that were needed and given, with what was refused otherwise.
        evidence: what was read at planning time and what it showed; part of the plan's fingerprint.
        evaluate: gives the bytes of a computed tensor; None where nothing may be computed while planning.
        heard: is told of values that were read: how many bytes, of which tensor.
    """

    allow: frozenset[str] = frozenset()
    notes: list[Note] = field(default_factory=list)
    consents: dict[str, str] = field(default_factory=dict)
    evidence: list[str] = field(default_factory=list)
    evaluate: Callable[[LazyTensor], bytes] | None = None
    heard: Callable[[int, str], None] = _unheard
    _kept: dict[str, int] | None = field(default=None, init=False, repr=False, compare=False)

    def note(self, severity: Severity, code: str, text: str) -> None:
        """Tell the user something, once."""
        note = Note(severity=severity, code=code, text=text)
        if note not in self.notes:
            self.notes.append(note)

    def consent(self, error: Refused) -> None:
        """Stop with `error` unless the user allowed its code; a given consent is kept for the receipt."""
        if error.code not in self.allow:
            error.consent = True
            raise error
        self.consents[error.code] = error.what

    def read(self, tensor: LazyTensor, *, max_bytes: int = MAX_READ) -> bytes:
        """The bytes of a small stored tensor, little-endian and row-major.

        Raises:
            Refused: larger than `max_bytes` (`read-too-large`), or not stored as it is (`read-computed`).
        """
        if tensor.info.nbytes > max_bytes:
            raise Refused(
                "read-too-large", f"planning may read {max_bytes} bytes of a tensor, not {tensor.info.nbytes}"
            )
        raw = b"".join(_blocks(_runs(tensor)))
        digest = hashlib.sha256(raw).hexdigest()[:16]
        self.evidence.append(f"read {tensor.info.dtype.value} {list(tensor.info.shape)} sha256 {digest}")
        return raw

    def compute(self, tensor: LazyTensor) -> bytes:
        """The bytes of a computed tensor of a few numbers, such as the rank that a matrix has.

        Raises:
            Refused: larger than `MAX_COMPUTED` (`read-too-large`), or nothing may be computed here (`read-computed`).
        """
        if tensor.info.nbytes > MAX_COMPUTED:
            raise Refused("read-too-large", f"planning may compute {MAX_COMPUTED} bytes, not {tensor.info.nbytes}")
        if self.evaluate is None:
            raise Refused("read-computed", f"a computed tensor can't be read while planning: {describe(tensor)}")
        raw = self.evaluate(tensor)
        self.evidence.append(f"computed {describe(tensor)}: {raw.hex()}")
        return raw

    def is_zero(self, tensor: LazyTensor) -> bool:
        """True where every element is zero (of either sign), streamed; stops at the first other byte."""
        stored = tensor
        while isinstance(stored, Cast) and stored.source.info.dtype.is_float:
            # A float that isn't zero stays so when rounded, but for the tiniest: those count as not zero.
            stored = stored.source
        dtype = stored.info.dtype
        width = dtype.bits // 8 if dtype.is_float and dtype.bits % 8 == 0 else 0
        zero = all(_only_zeros(block, width) for block in _blocks(_runs(stored), self._kept))
        self.evidence.append(f"{describe(tensor)} is {'zero' if zero else 'not zero'}")
        return zero

    def nonfinite(self, tensor: LazyTensor) -> int:
        """The number of elements that are NaN or infinite, streamed and without arithmetic: exponents of ones."""
        dtype = tensor.info.dtype
        test = _NONFINITE.get(dtype)
        if test is None or not tensor.info.numel:
            return 0
        count = sum(map(test, self._whole_blocks(tensor)))
        self.evidence.append(f"{describe(tensor)} has {count} values that are not finite")
        return count

    def odd(self, tensor: LazyTensor) -> tuple[int, int]:
        """The numbers of elements that are NaN or infinite, and of finite ones as large as no weight: see `HUGE`."""
        dtype = tensor.info.dtype
        test = _NONFINITE.get(dtype)
        if test is None or not tensor.info.numel:
            return 0, 0
        width, ordinary = dtype.bits // 8, _ORDINARY[dtype]
        bad = above = 0
        for block in self._whole_blocks(tensor):
            if marked := block[width - 1 :: width].translate(None, ordinary):
                found = test(block)
                bad, above = bad + found, above + len(marked) - found
        self.evidence.append(f"{describe(tensor)} has {bad} values that are not finite, {above} that are huge")
        return bad, above

    def _whole_blocks(self, tensor: LazyTensor) -> Iterator[bytes]:
        """Blocks that cut no element."""
        runs = _runs(tensor)
        blocks = _blocks(runs, self._kept)
        return blocks if len(runs) == 1 else _aligned(blocks)

    @contextmanager
    def keeping_open(self) -> Iterator[None]:
        """Files stay open between one tensor and the next, where many of one file are looked at."""
        self._kept = {}
        try:
            yield
        finally:
            for fd in self._kept.values():
                os.close(fd)
            self._kept = None

    def equal(self, a: LazyTensor, b: LazyTensor) -> bool:
        """True where both have one dtype, shape and content, bit by bit; streamed, stops at the first difference."""
        same = a.info == b.info
        if same and not _is_same_content(_runs(a), _runs(b)):
            left, right = _blocks(_runs(a)), _blocks(_runs(b))
            same = all(x == y for x, y in zip(_aligned(left), _aligned(right), strict=True))
        self.evidence.append(f"{fold([describe(a)])} {'equals' if same else 'differs from'} {fold([describe(b)])}")
        return same


def _table(is_marked: Callable[[int], bool]) -> bytes:
    return bytes(int(is_marked(n)) for n in range(256))


def _counter(width: int, *tables: bytes) -> Callable[[bytes], int]:
    """Counts elements whose last bytes, the highest first, are marked in the tables."""
    firsts = [bytes([n]) for n in range(256) if tables[0][n]]

    def count(block: bytes) -> int:
        high = block[width - 1 :: width]
        if not any(first in high for first in firsts):  # what nearly all blocks are, and a search is the fastest test
            return 0
        marked = -1
        for back, table in enumerate(tables, 1):
            marked &= int.from_bytes(block[width - back :: width].translate(table), "little")
            if not marked:
                return 0
        return marked.bit_count()

    return count


_ONES_7 = _table(lambda n: n & 0x7F == 0x7F)
_TOP_BIT = _table(lambda n: n >= 0x80)
_TOP_5 = _table(lambda n: n & 0x7C == 0x7C)
_NONFINITE: dict[DType, Callable[[bytes], int]] = {
    DType.F16: _counter(2, _TOP_5),
    DType.BF16: _counter(2, _ONES_7, _TOP_BIT),
    DType.F32: _counter(4, _ONES_7, _TOP_BIT),
    DType.F64: _counter(8, _ONES_7, _table(lambda n: n >= 0xF0)),
}


HUGE = 2.0**33
"""From here on a finite number is none that a weight has; of float16, from half of its largest number on."""

_ORDINARY: dict[DType, bytes] = {
    dtype: bytes(n for n in range(256) if n & 0x7F < first)
    for dtype, first in ((DType.F16, 0x78), (DType.BF16, 0x50), (DType.F32, 0x50), (DType.F64, 0x42))
}
"""Highest bytes of numbers that are smaller than `HUGE`."""


def _only_zeros(block: bytes, float_width: int) -> bool:
    """True where all bytes are zero, but for the sign bits of floats of `float_width` bytes (0: no sign bits)."""
    if block == bytes(len(block)):  # where all are zero, this is fifty times as fast as a strip
        return True
    if not float_width or block.strip(b"\0\x80"):  # neither a zero nor a sign: what nearly all blocks have at an end
        return False
    signs = block[float_width - 1 :: float_width]
    return not signs.strip(b"\0\x80") and not any(block[i::float_width].strip(b"\0") for i in range(float_width - 1))


def _runs(tensor: LazyTensor) -> tuple[ByteRun, ...]:
    runs = byte_runs(tensor)
    if runs is None:
        raise Refused("read-computed", f"a computed tensor can't be read while planning: {describe(tensor)}")
    return runs


def _is_same_content(a: tuple[ByteRun, ...], b: tuple[ByteRun, ...]) -> bool:
    """True for the same places of files that the Hub lists with one digest: nothing has to be read."""
    return len(a) == len(b) and all(
        (x.offset, x.length) == (y.offset, y.length) and sparse.same_content(x.file, y.file)
        for x, y in zip(a, b, strict=True)
    )


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = open_input(Path(path))
    try:
        yield fd
    finally:
        os.close(fd)


def _blocks(runs: tuple[ByteRun, ...], kept: dict[str, int] | None = None) -> Iterator[bytes]:
    for run in runs:
        if kept is not None and run.file not in kept:
            kept[run.file] = open_input(Path(run.file))
        with _opened(run.file) if kept is None else nullcontext(kept[run.file]) as fd:
            for at in range(0, run.length, STREAM_BLOCK):
                length = min(STREAM_BLOCK, run.length - at)
                yield read_exact(fd, run.offset + at, length, file=run.file)


def _aligned(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of `STREAM_BLOCK`, the last one shorter, wherever the runs were cut."""
    held = bytearray()
    for block in blocks:
        held += block
        while len(held) >= STREAM_BLOCK:
            yield bytes(held[:STREAM_BLOCK])
            del held[:STREAM_BLOCK]
    if held:
        yield bytes(held)
