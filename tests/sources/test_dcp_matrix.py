"""The whole matrix of distributed checkpoints, trained here and now by torch and accelerate on 1 to 4 ranks. Slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from converter.errors import Refused
from converter.sources.dcp.source import SOURCE
from dcp.compare import facts, faults, run_names
from places import RUNS

TRAIN = RUNS / "dcp" / "train.py"
REFUSED = {
    "accelerate-local": "fsdp-rank-files",
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_torch_and_accelerate_save_on_any_number_of_ranks_is_gathered_bit_by_bit(
    tmp_path: Path, ranks: int
) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    subprocess.run([sys.executable, str(TRAIN), str(tmp_path), "--ranks", str(ranks)], check=True, env=env, timeout=900)
    names = run_names(tmp_path)
    assert len(names) >= 14
    for name in names:
        run, layout = tmp_path / name, facts(tmp_path / name)["layout"]
        if layout in REFUSED:
            with pytest.raises(Refused) as caught:
                SOURCE.open(run, asked=name)
            assert caught.value.code == REFUSED[layout], name
        elif not layout.startswith("hf-"):
            assert faults(run) == [], name
