"""The stored cases of quantised weights are what the vendors' own code makes today.

`quantisers/bin/python`, among the trainers' environments, has bitsandbytes, compressed-tensors, gptqmodel and autoawq
without their dependencies (compressed-tensors needs loguru, gptqmodel pypcre and logbar), torch and safetensors.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from places import RUNS

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def made(envs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    python = envs / "quantisers" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment called quantisers")
    out = tmp_path_factory.mktemp("vendors") / "vendors.safetensors"
    script = Path(__file__).with_name("quantise_with_vendors.py")
    subprocess.run([python, script, out], check=True, capture_output=True)
    return load_file(out)


def test_vendors_make_what_is_stored(made: dict[str, torch.Tensor]) -> None:
    stored = load_file(RUNS / "quantised" / "vendors.safetensors")
    assert made.keys() == stored.keys()
    assert [
        n
        for n in stored
        if not torch.equal(made[n].reshape(-1).view(torch.uint8), stored[n].reshape(-1).view(torch.uint8))
    ] == []
