"""Mutated torch files and shards: a value or a clean refusal, whatever the numbers and names in them became.

Most cases run in a process of its own with 1 GB of address space, which reads and plans; the rest here, where torch
computes every value that a mutated checkpoint still promises. `FUZZ_SECONDS` makes it longer.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from converter.converters.gather.gather import Gather
from converter.core.context import Context
from converter.errors import ConvertError
from converter.sources.deepspeed.source import SOURCE, adam_moments, open_tag
from fuzz_pickles import PICKLED, changed_inside
from places import IMPORTED, TESTS
from zero.compare import RUNS, evaluated, run_names

LONGER = os.environ.get("FUZZ_SECONDS")
SECONDS = float(LONGER or "60")
CASES = 150
"""After which the first test stops, where it is not asked to go on for longer."""

COMPUTED = ("lora-z3-n2", "aligned-z1-n2", "elastic-z2-n3", "plain-z0-n1")
SHARE_COMPUTED = 0.03
"""Of the time, for each of the above."""


def _models(folder: Path) -> list[Path]:
    """A model in torch's zip format, and one in the format before it, with views and two names of one storage."""
    made = []
    for name, modern in (("zip", True), ("legacy", False)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"architectures": ["X"], "tie_word_embeddings": true}')
        weight = torch.arange(24.0).reshape(4, 6)
        held = {"a.weight": weight, "b.weight": weight.t(), "c": weight[1:3].bfloat16(), "lm_head.weight": weight}
        torch.save(held, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=modern)
        made.append(folder / name)
    return made


def test_mutated_files_are_read_or_refused_in_one_gigabyte(tmp_path: Path) -> None:
    kinds = (
        RUNS,
        RUNS.with_name("universal_runs"),
        RUNS.with_name("split_runs"),
        RUNS.parents[1] / "dcp" / "runs",
        RUNS.parents[1] / "verl_saves" / "runs",
    )
    runs = [d for kind in kinds for d in sorted(kind.glob("*")) if any(p.name.endswith(PICKLED) for p in d.rglob("*"))]
    assert len(runs) >= len(run_names())
    models = _models(tmp_path / "made")
    program = [sys.executable, str(TESTS / "fuzz" / "fuzz_pickles.py"), str(tmp_path / "scratch")]
    seconds = SECONDS * (1 - SHARE_COMPUTED * len(COMPUTED))
    command = [*program, *map(str, [*runs, *models, *models]), "--seconds", str(seconds), "--seed", "2026"]
    command += [] if LONGER else ["--cases", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + 2 * seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["slowest"] < 20
    # That it gets past the first check of a file, and is not refused for one reason only.
    assert said["cases"] >= 100, said
    assert said["values"] >= 5, said
    assert len(said["refused"]) >= 4, said


def test_a_case_is_repeated_from_its_number_and_a_fault_of_ours_is_seen(tmp_path: Path) -> None:
    """What would make the test above fail: an exception that is not a refusal."""
    broken = (
        "import sys, fuzz_pickles\n"
        "def fault(path): raise RecursionError\n"
        "fuzz_pickles.read_file = fuzz_pickles.read_folder = fault\n"
        "sys.exit(fuzz_pickles.main())"
    )
    given = [str(tmp_path / "scratch"), str(RUNS / "plain-z0-n1"), "--only", "7"]
    command = [sys.executable, "-c", broken, *given]
    places = {"PYTHONPATH": os.pathsep.join(map(str, IMPORTED))}
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=False)
    assert (done.returncode, "case 7 of seed 0" in done.stderr) == (1, True), done.stderr


def _use_everything(run: Path) -> None:
    for master in (False, True):
        with suppress(ConvertError):
            found = open_tag(run, asked="x", master=master)
            assert all(t.info.nbytes < 10**6 for t in found.tensors.values())
            evaluated(found.tensors)
            with suppress(ConvertError):
                evaluated(Gather(lora_alpha=8)(found.replace(config={"a": 1}), Context()).tensors)
    with suppress(ConvertError):
        evaluated(adam_moments(run, which="exp_avg"))
    SOURCE.survey(run)


@pytest.mark.parametrize("name", COMPUTED)
def test_mutated_shards_give_a_checkpoint_or_a_refusal(tmp_path: Path, name: str) -> None:
    dice = random.Random(sum(map(ord, name)))
    run = Path(shutil.copytree(RUNS / name, tmp_path / name))
    files = sorted((run / "global_step2").iterdir())
    began, count = time.monotonic(), 0
    while count < 5 or (LONGER and time.monotonic() - began < SECONDS * SHARE_COMPUTED):
        path = dice.choice(files)
        raw = path.read_bytes()
        path.write_bytes(changed_inside(raw, dice))
        start = time.monotonic()
        _use_everything(run)
        assert time.monotonic() - start < 20
        path.write_bytes(raw)
        count += 1
