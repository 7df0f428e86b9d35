"""`fix-disk-names`: tensors under their names in memory get the names that transformers' own save writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.families.disk_names import memory_form, with_disk_names


@dataclass(frozen=True)
class FixDiskNames:
    """Give a model the names that transformers' save writes: renames undone, stacks of experts taken apart."""

    name: ClassVar[str] = "fix-disk-names"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint under its names on disk.

        Raises:
            Refused: see `with_disk_names`.
        """
        form = memory_form(checkpoint.tensors, checkpoint.config)
        if form is None or not (form.renamed or form.apart):
            return checkpoint
        return with_disk_names(checkpoint, context)
