"""The receipt against the folder: are these the files that the conversion wrote?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converter.core.files.names import FILES, RECEIPT
from converter.core.files.strict_json import load_json
from converter.core.tensors.nodes import LazyTensor
from converter.errors import ConvertError
from converter.examine.verify.check import Check, fails, holds, note
from converter.examine.verify.checksums import check_checksums
from converter.text import fold, show


def check_receipt(root: Path, names: frozenset[str], tensors: Callable[[], Mapping[str, LazyTensor]]) -> list[Check]:
    """Whether the tensors that `rlhf-convert.json` counts, measures and has checksums of are those that are here.

    A folder without a receipt gets a note: it was not made by this tool, or the receipt was taken away.

    Args:
        names: of the folder's tensors.
        tensors: gives them as they lie on disk; called where a file is not as it was written.
    """
    path = root / RECEIPT
    if not path.is_file():
        return [note("receipt", "receipt-missing", f"there is no {RECEIPT}: what made this folder isn't recorded")]
    try:
        receipt = load_json(path, root=root)
    except ConvertError as error:
        return [fails("receipt", "receipt-broken", f"{RECEIPT}: {error.what}")]
    if not isinstance(receipt, dict):
        return [fails("receipt", "receipt-broken", f"{RECEIPT} is no JSON object")]
    if gone := [key for key in _ALWAYS if key not in receipt]:
        return [fails("receipt", "receipt-broken", f"{RECEIPT} lacks {show(', '.join(gone))}, which every one has")]
    counted = _tensors(receipt, names) or [holds("receipt", _made(receipt))]
    return [*counted, *check_checksums(root, receipt, tensors)]


_ALWAYS = ("version", "recipe", "inputs", "counts")


def _made(receipt: Mapping[str, Any]) -> str:
    """`made by rlhf-convert 0.1.0: gather, merge-lora; 28 copied, 14 computed`."""
    recipe = receipt.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    names = [next(iter(s), "?") for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []
    counts = receipt.get("counts")
    numbers = ", ".join(f"{v} {k}" for k, v in counts.items() if v) if isinstance(counts, dict) else ""
    words = f"made by rlhf-convert {show(receipt.get('version'))}"
    return words + (f": {show(', '.join(names))}" if names else "") + (f"; {show(numbers)}" if numbers else "")


def check_source(root: Path, digest: str, asked: str) -> list[Check]:
    """Whether the receipt names the folder that is compared with as what this one was made of.

    Args:
        root: the folder with the receipt.
        digest: sha256 over the headers of the source's weight files.
        asked: the source, as the user wrote it.
    """
    receipt = _read(root)
    inputs = receipt.get("inputs") if isinstance(receipt, dict) else None
    if not isinstance(inputs, dict) or not inputs:
        return []
    if any(isinstance(each, dict) and each.get("header_digest") == digest for each in inputs.values()):
        return []
    names = ", ".join(str(each.get("name")) for each in inputs.values() if isinstance(each, dict))
    text = f"the receipt says that this was made of {show(names)}, whose headers are not those of {show(asked)}"
    return [note("receipt", "source-differs", text)]


def is_receipt(asked: str) -> bool:
    """True where the path is a receipt's, and not a folder's."""
    path = Path(asked).expanduser()
    return path.name == RECEIPT and path.is_file()


def check_other_receipt(asked: str, root: Path, stored: Mapping[str, LazyTensor]) -> list[Check]:
    """Whether a folder holds, tensor by tensor, what another receipt says was written.

    Args:
        asked: the receipt, as the user wrote it.
        stored: the folder's tensors.
    """
    receipt = _read(Path(asked).expanduser().parent)
    found = check_checksums(root, receipt if isinstance(receipt, dict) else {}, lambda: stored)
    if any(c.code in ("checksums-missing", "checksums-unread") for c in found):
        text = (
            f"{show(asked)} has no checksums to compare with" if found[0].code == "checksums-missing" else found[0].text
        )
        return [fails("against", "not-compared", text)]
    return [*_names(receipt, frozenset(stored)), *found]


def _names(receipt: Mapping[str, Any], here: frozenset[str]) -> list[Check]:
    """Tensors that only one side has."""
    files = receipt.get(FILES)
    there = frozenset(n for f in files.values() for n in f["tensors"]) if isinstance(files, dict) else frozenset()
    checks = []
    if lost := sorted(there - here):
        text = f"{len(lost)} tensors of the receipt are not here: {fold(lost)}"
        checks.append(fails("against", "tensors-lost", text))
    if added := sorted(here - there):
        text = f"{len(added)} tensors are not in the receipt: {fold(added)}"
        checks.append(fails("against", "tensors-added", text))
    return checks


def has_fresh_head(root: Path) -> bool:
    """True where the receipt says that the head was made fresh, with the user's consent."""
    receipt = _read(root)
    consents = receipt.get("consents") if isinstance(receipt, dict) else None
    return isinstance(consents, dict) and "init-head" in consents


def _read(root: Path) -> Any:
    """The receipt's content; None where there is none that can be read."""
    try:
        return load_json(root / RECEIPT, root=root) if (root / RECEIPT).is_file() else None
    except ConvertError:
        return None


def _tensors(receipt: Mapping[str, Any], names: frozenset[str]) -> list[Check]:
    """Computed tensors that the receipt measured must be there, and their number must be what was counted."""
    measured = receipt.get("tensors")
    gone = [n for n in measured if n not in names] if isinstance(measured, dict) else []
    if gone:
        text = f"{len(gone)} tensors that the conversion computed are not in the folder: {fold(gone)}"
        return [fails("receipt", "receipt-differs", text)]
    counts = receipt.get("counts")
    if not isinstance(counts, dict):
        return []
    written = sum(v for k, v in counts.items() if k in ("copied", "computed", "filled") and isinstance(v, int))
    if written and written != len(names):
        text = f"the receipt counts {written} tensors, the folder has {len(names)}: it was changed since"
        return [fails("receipt", "receipt-differs", text)]
    return []
