"""`dequantize`: every quantised weight in the model's 16 bits, as the vendor's own code gives it, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from converter.converters.merge.quantised.whole import found_in, whole
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.errors import Refused
from converter.text import show

DEQUANTISED = "dequantised"
"""Code of the note that says which weights were made whole."""


@dataclass(frozen=True)
class Dequantise:
    """Make every quantised weight whole and drop `quantization_config`: what the class asks for."""

    name: ClassVar[str] = "dequantize"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The same model, whole.

        Raises:
            Refused: nothing is quantised (`not-quantised`), a part is missing or does not fit
                (`quantised-incomplete`), or the format is not read (`quantised-unsupported`).
        """
        found = found_in(checkpoint)
        if found.method and (found.faults or found.unsupported):
            return whole(checkpoint, found, context).after
        if not found.weights:
            said = f"config.json says {found.title}, and every weight is whole" if found.method else "no weight is"
            raise Refused("not-quantised", f"nothing here is quantised: {said}", where=show(checkpoint.origin.asked))
        made = whole(checkpoint, found, context).after
        context.note("info", DEQUANTISED, f"dequantised: {found.words}")
        return made
