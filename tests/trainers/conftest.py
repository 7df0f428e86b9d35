"""Where the trainers' environments are; see `tests/trainers/run_trainers.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def envs() -> Path:
    """The folder of environments."""
    given = os.environ.get("RLHF_CONVERT_TRAINERS", "~/.cache/rlhf-convert-trainers")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        pytest.skip("no trainer environments: python tests/trainers/run_trainers.py builds them")
    return folder
