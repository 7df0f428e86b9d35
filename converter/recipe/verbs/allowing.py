"""The user's consent to names in pickled files, for the time of a verb."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext


def allowing(names: Sequence[str]) -> AbstractContextManager[object]:
    """While it is entered, pickled files may mention names that match one of the patterns.

    Raises:
        UsageError: a pattern is not one that is understood (`allow-name`).
    """
    if not names:
        return nullcontext()
    from converter.core.formats.pickle_names import allowing_names

    return allowing_names(names)
