"""Folders of megatron-core's checkpoints by the names of their files: what lies in one, and whether it was finished.

`metadata.json` names the layout and is written last, by rank 0; `.metadata` before it, `common.pt` (until 0.18) first.

Source: https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/dist_checkpointing/serialization.py
(`save`) and megatron/training/checkpointing.py (`get_checkpoint_name`) there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from converter.core.files.opening import read_limited
from converter.core.files.strict_json import load_json
from converter.errors import ConvertError, Refused
from converter.sources.survey import file_names
from converter.text import show

Kind = Literal["torch_dist", "other", "unfinished", "legacy"]

METADATA, MANIFEST, COMMON = ".metadata", "metadata.json", "common.pt"
RANK_FILE = "model_optim_rng.pt"
"""A rank's model in the old format."""
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3}))?(?:_(\d{3}))?", re.ASCII)
_ITERATION = re.compile(r"iter_(\d{7})", re.ASCII)
"""Folders that Megatron's runs have, whatever is missing in them, and those of one other trainer."""
_OF_FSDP = frozenset({"meta.json", "rng.pt"})
"""What slime's FSDP backend writes into such a folder.

Source: https://github.com/THUDM/slime/blob/05254ea/slime/backends/fsdp_utils/checkpoint.py
"""
_READ = "torch_dist"
_MAX_MANIFEST = 1_000_000


def kind_here(root: Path) -> Kind | None:
    """What of Megatron's lies in a folder itself.

    `other` is a layout that its manifest names and that is not read, `unfinished` one without a manifest.
    """
    names = file_names(root)
    if MANIFEST in names:
        backend = backend_of(root)
        if backend is not None:
            return "torch_dist" if backend == _READ else "other"
    is_iteration = _ITERATION.fullmatch(root.name) is not None and not names & _OF_FSDP
    if _has_pieces(names) and (COMMON in names or is_iteration):
        return "unfinished"
    if COMMON in names and METADATA in names:
        return "unfinished"
    return "legacy" if rank_folders(root) else None


def _has_pieces(names: frozenset[str]) -> bool:
    return any(n.endswith(".distcp") for n in names)


def backend_of(root: Path) -> str | None:
    """The layout that `metadata.json` names; None where it is a file of something else."""
    try:
        if (root / MANIFEST).stat().st_size > _MAX_MANIFEST:
            return None
        value = load_json(root / MANIFEST)
    except (ConvertError, OSError):
        return None
    backend = value.get("sharded_backend") if isinstance(value, dict) else None
    return backend if isinstance(backend, str) else None


def rank_folders(root: Path) -> list[Path]:
    """Folders of ranks in the old format, in which each wrote a file of its own."""
    try:
        below = [p for p in root.iterdir() if RANK_FOLDER.fullmatch(p.name) and p.is_dir()]
    except OSError:
        return []
    return sorted(p for p in below if (p / RANK_FILE).is_file())


def expect_read(root: Path) -> None:
    """Go on with a folder in the newer format, in the layout that is read.

    Raises:
        Refused: another layout (`megatron-backend`), one that was not finished (`megatron-unfinished`), or `.metadata`
            is missing (`dcp-metadata-missing`).
    """
    kind = kind_here(root)
    if kind == "other":
        raise _other(root, str(backend_of(root)))
    if kind == "unfinished":
        raise unfinished(root)
    if METADATA not in file_names(root):
        raise Refused(
            "dcp-metadata-missing",
            f"{METADATA} is missing: only it says what the .distcp files hold",
            where=show(root),
            next="copy the hidden file .metadata from where it was saved, which `cp DIR/*` leaves out; or take an "
            "earlier checkpoint",
        )


def unfinished(root: Path) -> Refused:
    """The refusal of a checkpoint of which the last file is missing."""
    return Refused(
        "megatron-unfinished",
        f"{MANIFEST} is missing, which Megatron writes last: the save was cut off, or the copy is not whole",
        where=show(root),
        next="take the checkpoint before it, or copy this one again",
    )


_WHY_NOT = {
    "zarr": "each tensor is a folder of its own; megatron-core 0.15 was the last to read it",
    "fsdp_dtensor": "it is Megatron-FSDP's, which splits tensors by rows of flat buffers",
    "torch_dcp": "it is of Megatron with torch's FSDP2, whose names are others",
}


def _other(root: Path, backend: str) -> Refused:
    what = f"{MANIFEST} says that this was saved as {show(backend)}, which is not read"
    if backend in _WHY_NOT:
        what += f": {_WHY_NOT[backend]}"
    step = "load it with the trainer that wrote it, and save it with --ckpt-format torch_dist"
    return Refused("megatron-backend", what, where=show(root), next=step)


def tracked(path: Path, root: Path) -> str | None:
    """What a run's tracker file says: the number of its last complete checkpoint, or `release`."""
    if not path.is_file():
        return None
    try:
        return read_limited(path, limit=64, root=root).decode("ascii").strip()
    except (Refused, UnicodeDecodeError):
        return None


def expect_own_name(root: Path, iteration: object, what: str) -> None:
    """Go on where a folder's name does not say another iteration than a file in it does.

    Those that convert checkpoints write iteration 0 under any name, and `release` is none.

    Args:
        what: the file that says the iteration, as the subject of a sentence.

    Raises:
        Refused: the two differ (`megatron-mixed`).
    """
    named = _ITERATION.fullmatch(root.name)
    if named is None or type(iteration) is not int or iteration <= 0 or not int(named[1]):
        return
    if int(named[1]) != iteration:
        raise Refused(
            "megatron-mixed",
            f"{what} is of iteration {iteration}, and the folder's name says {int(named[1])}",
            where=show(root),
            next=f"put the files of one save into one folder; or name it iter_{iteration:07d}, if all are of that save",
        )
