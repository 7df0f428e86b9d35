"""Lightning's checkpoints under FSDPStrategy and ModelParallelStrategy: gathered from the run's top.

`tests/runs/dcp/lightning_saves.py` had Lightning's Trainer save the runs; the oracle is what lived in its memory.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import pytest
from safetensors.torch import load_file

from converter.cli import main
from converter.diagnostic import Command
from converter.errors import ConvertError
from converter.examine.doctor import DoctorRequest, examine
from converter.sources.dcp.source import SOURCE
from lived import live
from places import RUNS
from zero.compare import differences, evaluated

SAVED = RUNS / "dcp" / "lightning_runs"
RUN = SAVED / "lightning-fsdp-sharded-n2"
PARALLEL = SAVED / "lightning-parallel-sharded-n2"
PARALLEL_WHOLE = SAVED / "lightning-parallel-full-n2"
PLACE = "lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"


@pytest.mark.parametrize("run", [RUN, PARALLEL, PARALLEL_WHOLE], ids=lambda r: r.name)
def test_the_model_is_gathered_from_the_run_s_top(run: Path, tmp_path: Path) -> None:
    assert main(["gather", str(run), str(tmp_path / "out"), "-q"]) == 0
    wanted = live(run)
    if run is RUN:
        del wanted["lm_head.weight"]  # it is the embedding
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), wanted) == []


@pytest.mark.parametrize("run", [RUN, PARALLEL], ids=lambda r: r.name)
@pytest.mark.parametrize("which", ["exp_avg", "exp_avg_sq"])
def test_moments_are_those_that_lived(which: Literal["exp_avg", "exp_avg_sq"], run: Path) -> None:
    found = evaluated(SOURCE.adam_moments(run, which=which))
    assert differences({n.removeprefix("model."): t for n, t in found.items()}, live(run, which)) == []


def test_what_doctor_says_to_do_does_it(tmp_path: Path) -> None:
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    (found,) = (f for f in examine(DoctorRequest(str(run))).findings if f.code == "training-state")
    assert isinstance(found.next, Command)
    assert main([*found.next.words[1:], "-q"]) == 0


@pytest.mark.parametrize("harm", ["missing", "half", "exchanged"])
def test_a_harmed_piece_is_refused_and_doctor_names_it(harm: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    one, other = (run / PLACE / f"__{r}_0.distcp" for r in (0, 1))
    if harm == "missing":
        one.unlink()
    elif harm == "half":
        os.truncate(one, one.stat().st_size // 2)
    else:
        one.rename(run / "aside")
        other.rename(one)
        (run / "aside").rename(other)
    with pytest.raises(ConvertError):
        SOURCE.adam_moments(run, which="exp_avg")
    assert [f.code for f in examine(DoctorRequest(str(run))).findings if f.severity != "cosmetic"]
