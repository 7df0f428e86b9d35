"""What transformers 4.57 saves is what a loader asks for by our word; one tensor less is named."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from matrix import python_of
from save_models import CLASSES

from converter.families.expected import Expected, compare, expected
from oracle.bases import read_tensors

pytestmark = pytest.mark.trainer

OLD = "trl-0.28"
"""An environment with transformers 4.57.6."""


@pytest.fixture(scope="module")
def saved(envs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved-by-4")
    script = Path(__file__).with_name("save_models.py")
    subprocess.run([python_of(envs, OLD), script, root], check=True, capture_output=True)
    return root


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_shapes_of_transformers_4_are_what_is_asked_for(name: str, saved: Path) -> None:
    folder = saved / name
    config = json.loads((folder / "config.json").read_text())
    stored = {n: tuple(t.shape) for n, t in read_tensors(folder).items()}
    wanted = expected(config)
    assert isinstance(wanted, Expected)
    assert not compare(stored, wanted, config)
    for lost in stored:
        assert set(compare({n: s for n, s in stored.items() if n != lost}, wanted, config).missing) == {lost}
    # Names in memory of version 4 are names on disk, and what it does not save is tied to what it does.
    memory = {n: tuple(s) for n, s in json.loads((folder / "memory.json").read_text()).items()}
    assert stored.items() <= memory.items()
    tied = memory.keys() - stored.keys()
    assert not compare(memory, wanted, config) or tied
