"""The annotation that tells the recipe which fields of a converter are checkpoints."""

from __future__ import annotations

from typing import Annotated, Final

from converter.core.checkpoint import Checkpoint


class InputMarker:
    """In a recipe such a field is the name of an input; when the converter runs it holds the opened checkpoint."""


INPUT: Final = InputMarker()

Input = Annotated[Checkpoint, INPUT]
"""A field of a converter that names one of the recipe's inputs. `tuple[Input, ...]` names several."""
