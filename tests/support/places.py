"""Folders of the repository that tests and scripts name."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"
RUNS = TESTS / "runs"
"""Checkpoints that real trainers saved, and the scripts that made them."""
SUPPORT = TESTS / "support"
IMPORTED = (SUPPORT, RUNS, TESTS / "fuzz", REPOSITORY / "tools")
"""Folders from which tests import; pytest's `pythonpath`, for processes that a test starts."""
