"""A file of weights, whichever container: safetensors, or torch.save's, read symbolically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converter.core.checkpoint import RecordCheck
from converter.core.files import sparse
from converter.core.files.opening import Identity
from converter.core.formats.safetensors_io import read_header
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import show

PICKLED_SUFFIXES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Attributes:
        tensors: in file order.
        metadata: `__metadata__` of safetensors; nothing for torch's files.
        size: of the file, in bytes.
        description: bytes that stand for names, types and places of the tensors, for a digest.
        checks: checksums that the container records of the bytes it holds.
        wrapped_in: keys that the tensors lie under, in the pickle; a loader of transformers looks at the top.
    """

    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    size: int
    description: bytes
    identity: Identity
    checks: tuple[RecordCheck, ...] = ()
    wrapped_in: tuple[str, ...] = ()


def read_weights(path: Path, *, root: Path, named: str) -> WeightFile:
    """The tensors of a file, by its name's suffix; a pickle under a safetensors name is refused, and the reverse.

    Args:
        named: the path that lazy tensors name the file by.

    Raises:
        Refused: broken, cut short, hostile, or holding something else than tensors by name (`pickled-not-weights`).
    """
    if path.name.endswith(PICKLED_SUFFIXES):
        return _read_pickled(path, root, named)
    header = sparse.read_again(path, lambda: read_header(path, root=root))
    found = {n: tensors.stored(i, named, header.data_start + begin) for n, (i, begin, _) in header.tensors.items()}
    return WeightFile(found, header.metadata, header.file_size, header.raw, header.identity)


def _read_pickled(path: Path, root: Path, named: str) -> WeightFile:
    # Imported here: headers of safetensors are inspected without it, in a fraction of a second.
    from converter.core.formats.torch_file import read_torch_file, state_dict, wrapped_in

    file = read_torch_file(path, root=root)
    found = state_dict(file.value)
    if found is None:
        raise Refused(
            "pickled-not-weights",
            "the file holds something else than tensors by name",
            where=show(path),
            expected="what torch.save(model.state_dict()) writes",
        )
    return WeightFile(
        found, {}, file.identity.size, file.digest.encode(), file.identity, file.checks, wrapped_in(file.value)
    )
