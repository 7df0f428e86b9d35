"""Copies of saved runs, changed with torch's own classes, and what becomes of them."""

from __future__ import annotations

import pickle  # noqa: TID251
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.errors import ConvertError
from converter.sources.dcp.source import SOURCE
from dcp.compare import RUNS


def copied(tmp_path: Path, name: str) -> Path:
    """A run of the fixtures that may be changed."""
    return Path(shutil.copytree(RUNS / name, tmp_path / name))


def refused(run: Path, code: str) -> ConvertError:
    """The refusal of a run, which must have this code."""
    with pytest.raises(ConvertError) as caught:
        SOURCE.open(run, asked=str(run))
    assert caught.value.code == code, caught.value
    return caught.value


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change `.metadata` with torch's own classes."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, protocol=2))
