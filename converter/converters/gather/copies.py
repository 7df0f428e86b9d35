"""Tensors of which several ranks saved a copy: they are compared, and one is taken."""

from __future__ import annotations

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.errors import Refused
from converter.text import fold, show


def expect_equal_copies(checkpoint: Checkpoint, context: Context) -> None:
    """Compare what several ranks saved of one tensor.

    Raises:
        Refused: it has different values (`zero-mixed`).
    """
    differ = [name for name, taken, other in checkpoint.copies if not context.equal(taken, other)]
    if differ:
        text = f"ranks that should have copies of one tensor have different values: {fold(dict.fromkeys(differ))}"
        raise Refused(
            "zero-mixed",
            text,
            where=show(checkpoint.origin.asked),
            next="look for another checkpoint of the run: its ranks are not of one model",
        )
