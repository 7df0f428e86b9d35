"""`distribute`: a model as a torch distributed checkpoint, for trainers that begin from nothing else.

Keys are those that the model's own `state_dict` has, below the dictionaries that a trainer puts it in: torch's planner
asks for exactly these, and for both names of a tied pair. Names are those in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from converter.core.checkpoint import MODEL, Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command
from converter.errors import Refused, UsageError
from converter.families.implied import class_of
from converter.families.memory_names import architecture, sorted_names
from converter.families.words import OLD_BUFFERS
from converter.text import fold, show

UNDER = "model"
TOP = "."
_UNDER = re.compile(r"\w{1,64}(?:\.\w{1,64}){0,7}", re.ASCII)


@dataclass(frozen=True)
class Distribute:
    """Write a model for torch's distributed loader.

    Attributes:
        under: keys of the dictionaries that the trainer saves it in, with dots: `model` (NeMo-RL), `app.model` (slime);
            `.`: none.
    """

    name: ClassVar[str] = "distribute"

    under: str = UNDER

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The same tensors by their names in memory.

        Raises:
            UsageError: not keys of dictionaries (`usage`).
            Refused: an adapter, or weights in files of their own (`dcp-shape`); tensors that transformers changes when
                it loads them (`dcp-names`).
        """
        if self.under != TOP and not _UNDER.fullmatch(self.under):
            what = f"{show(self.under)} is not a path of dictionary keys"
            raise UsageError("usage", what, expected=f"model, app.model, ..., or `{TOP}` for none")
        if checkpoint.origin.kind != MODEL or checkpoint.beside or checkpoint.subfolder:
            is_one = checkpoint.origin.kind == MODEL
            what = f"weights lie in {fold([*checkpoint.beside])}" if is_one else "it is an adapter"
            raise Refused(
                "dcp-shape",
                f"a distributed checkpoint holds one model's state, and here {what}",
                where=show(checkpoint.origin.asked),
                next=None if is_one else Command("merge-lora", (checkpoint.origin.asked, "OUT")),
            )
        names = _in_memory(checkpoint)
        kept = checkpoint.rename({n: m for n, m in names.items() if m != n})
        return kept.replace(
            tensors=_with_both_names(kept),
            shards={},
            container="distcp",
            under=() if self.under == TOP else tuple(self.under.split(".")),
        )


def _in_memory(checkpoint: Checkpoint) -> dict[str, str]:
    """Each tensor's name in memory; the same where the class is not known to rename."""
    built = architecture(class_of(checkpoint.config), checkpoint.config)
    if built is None:
        return {n: n for n in checkpoint.tensors}
    met: set[int] = set()
    found: dict[str, str] = {}
    changed = []
    for name in sorted_names(checkpoint.tensors):
        found[name], transform = built.in_memory(name, met)
        if transform is not None and not name.endswith(OLD_BUFFERS):
            changed.append(name)
    if changed:
        raise Refused(
            "dcp-names",
            f"{len(changed)} tensors are stacked, split or turned when transformers loads them, and a distributed "
            f"checkpoint is loaded as it is: {fold(changed)}",
            where=show(checkpoint.origin.asked),
            next="let the trainer load the model from this folder, which it can",
        )
    return found


def _with_both_names(checkpoint: Checkpoint) -> Mapping[str, LazyTensor]:
    """The tensors, tied ones under each of their names: a `state_dict` has them all."""
    found = dict(checkpoint.tensors)
    for group in checkpoint.ties:
        stored = next((checkpoint.tensors[n] for n in group if n in checkpoint.tensors), None)
        if stored is not None:
            found |= {n: stored for n in group if n not in found}
    return found
