"""Doctor inside a training run: a callback for transformers' trainers, and a function for everything else.

`converter.integrations.transformers` is loaded only by who imports it, and is the one that needs transformers.
"""

from __future__ import annotations

from converter.integrations.after_save import BrokenCheckpoint, Examination, examine_after_save

__all__ = ["BrokenCheckpoint", "Examination", "examine_after_save"]
