"""Bytes moved by the operating system: clones where the filesystem can, copies in the kernel, else reads and writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from converter.core.files import sparse
from converter.core.files.reading import InputFiles
from converter.core.tensors.byte_runs import ByteRun

COPY_BLOCK = 64 * 1024 * 1024
"""Bytes asked of the kernel in one call, so that progress moves and a signal is answered soon."""

PLAIN_BLOCK = 4 * 1024 * 1024
"""Bytes held in memory where the kernel can't copy between the two files."""

CLONE_BLOCK = 4096
"""Filesystems share blocks, not bytes: a run is split so that its middle is aligned in both files."""

_CANNOT = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """`pwrite` until all is written; short counts are normal."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def copy_run(files: InputFiles, run: ByteRun, out: int, offset: int, advance: Callable[[int], None]) -> None:
    """Copy one run of an input to `offset` of the descriptor `out`; `advance` is told of bytes as they are copied.

    Zeros, which lie in no input, are what a new file has there.

    Raises:
        Refused: the input ends before the run does (`input-cut`).
        OSError: the output can't be written (no space, a failing disk).
    """
    if not run.file:
        advance(run.length)
        return
    done = 0
    for piece in _pieces(run, offset):
        _copy_piece(files, run, out, offset, done, piece, advance)
        done += piece


def _pieces(run: ByteRun, offset: int) -> list[int]:
    """Lengths that add up to the run: up to a block boundary, whole blocks, the rest; one piece if never aligned."""
    if (run.offset - offset) % CLONE_BLOCK or run.length < 4 * CLONE_BLOCK:
        return [run.length]
    first = -run.offset % CLONE_BLOCK
    last = (run.length - first) % CLONE_BLOCK
    return [n for n in (first, run.length - first - last, last) if n]


def _copy_piece(
    files: InputFiles, run: ByteRun, out: int, offset: int, start: int, length: int, advance: Callable[[int], None]
) -> None:
    source = files.descriptor(run.file)
    done = start
    stop = start + length
    while done < stop:
        count = sparse.piece(source, min(COPY_BLOCK, stop - done))
        try:
            with sparse.reading(source, run.offset + done, count):
                copied = os.copy_file_range(source, out, count, run.offset + done, offset + done)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            break
        except AttributeError:
            break
        if copied == 0:
            break  # the file was cut, which reading it will tell, or its file system does not do this
        done += copied
        advance(copied)
    buffer = bytearray(min(PLAIN_BLOCK, stop - done))
    while done < stop:
        view = memoryview(buffer)[: min(PLAIN_BLOCK, stop - done)]
        files.read_into(run.file, run.offset + done, view)
        write_all(out, view, offset + done)
        done += len(view)
        advance(len(view))
