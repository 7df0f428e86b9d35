"""Layouts that are recognised and not read, each refused with the tool that can."""

from __future__ import annotations

from pathlib import Path

from converter.core.checkpoint import Checkpoint
from converter.errors import Refused, UsageError
from converter.sources.survey import Fault, SourceKind, Survey
from converter.text import show


class Unread:
    """The source that is asked last: it refuses by name what others can't read."""

    name = "unread"
    kind: SourceKind = "unread"
    precedence = -10

    def detect(self, root: Path) -> str | None:
        """What the folder is, or None."""
        refusal = other_layout(root)
        return None if refusal is None else refusal.what

    def survey(self, root: Path) -> Survey:
        """The refusal as a fault."""
        survey = Survey(root)
        if (refusal := other_layout(root)) is not None:
            survey.faults.append(Fault.of(refusal))
        return survey

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """Refuses.

        Raises:
            Refused: always, with the tool that can read it.
        """
        raise other_layout(root) or UsageError("not-a-checkpoint", "nothing here is recognised", where=show(asked))


def other_layout(root: Path) -> Refused | None:
    """The refusal for a layout that this source recognises and does not read."""
    try:
        below = [p for p in root.iterdir() if p.is_dir()]
    except OSError:
        return None
    if any(p.name == "offloaded_tensors" for p in below):
        text = "the optimizer was offloaded to NVMe: its state is in offloaded_tensors, and not whole in the shards"
        advice = "load it with DeepSpeed where the NVMe files are, and save it gathered (engine.save_16bit_model)"
        return Refused("zero-offloaded", text, where=show(root), next=advice)
    return None


SOURCE = Unread()
