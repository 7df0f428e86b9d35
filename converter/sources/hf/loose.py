"""Weight files without a config: what is in them, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

from converter.core.checkpoint import Checkpoint, Origin
from converter.core.files.opening import identity
from converter.core.formats.weight_file import PICKLED_SUFFIXES, read_weights
from converter.errors import Refused
from converter.sources.survey import Fault, StoredTensor, Survey, empty_tensors, file_names, is_weight_file
from converter.text import show

MOST_FILES = 64


def survey_files(root: Path, *, only: str | None = None) -> Survey:
    """Tensors and faults of all weight files in a folder, or of one; content never raises."""
    survey = Survey(root)
    names = file_names(root) if only is None else {only}
    found = sorted(n for n in names if is_weight_file(n) and n.endswith((".safetensors", *PICKLED_SUFFIXES)))
    others: list[Fault] = []
    for name in found[:MOST_FILES]:
        try:
            file = read_weights(root / name, root=root, named=str(root.resolve() / name))
        except Refused as error:
            (others if error.code == "pickled-not-weights" else survey.faults).append(Fault.of(error))
            continue
        survey.files[name] = file.size
        for tensor, lazy in file.tensors.items():
            survey.entries.setdefault(tensor, StoredTensor(lazy, str(root.resolve() / name)))
    if not survey.entries and not survey.faults:
        survey.faults += others
    empty = [n for n, e in survey.entries.items() if e.info.shape == (0,)]
    if empty:
        survey.faults.append(empty_tensors(empty, survey.entries, show(root)))
    return survey


def open_file(path: Path, asked: str) -> Checkpoint:
    """The tensors of one weight file, which has no config.

    Raises:
        Refused: what is wrong with it.
    """
    survey = survey_files(path.parent, only=path.name)
    if (error := survey.error()) is not None:
        raise error
    real = str(path.parent.resolve() / path.name)
    stored = "safetensors" if path.suffix == ".safetensors" else "torch"
    origin = Origin("weights", str(path.parent), asked, path.name, None, "", stored)
    return Checkpoint({n: e.tensor for n, e in survey.entries.items()}, {}, origin, inputs={real: identity(real)})
