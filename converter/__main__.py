"""`python -m converter` is `rlhf-convert`."""

from __future__ import annotations

from converter.cli import run

run()
