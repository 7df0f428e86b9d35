"""Where `recipes/` and `fixtures/` are: inside an installed package, at the top of a clone."""

from __future__ import annotations

from pathlib import Path


def shipped(folder: str) -> Path:
    """The folder that ships with the package: `recipes`, or `fixtures` with what the demo needs."""
    here = Path(__file__).parent
    inside = here / "_shipped" / folder
    return inside if inside.is_dir() else here.parent / folder
