"""Distributed checkpoints with mutated or cut files: a checkpoint or a clean refusal, whatever they became."""

from __future__ import annotations

import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from converter.converters.gather.gather import Gather
from converter.core.context import Context
from converter.errors import ConvertError
from converter.sources.dcp.source import SOURCE, adam_moments
from dcp.compare import RUNS
from zero.compare import evaluated

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))


def _mutated(raw: bytes, dice: random.Random) -> bytes:
    data = bytearray(raw)
    if dice.random() < 0.1:
        return bytes(data[: dice.randrange(len(data))])
    for _ in range(dice.choice((1, 1, 1, 4))):
        at = dice.randrange(len(data))
        if dice.random() < 0.5:
            data[at] ^= 1 << dice.randrange(8)
        else:
            data[at] = dice.choice((0, 1, 2, 7, 127, 255, data[dice.randrange(len(data))]))
    return bytes(data)


def _use_everything(run: Path) -> bool:
    """Whether weights could be opened; anything but a value or a refusal is an exception that fails the test."""
    is_read = False
    with suppress(ConvertError):
        found = SOURCE.open(run, asked="x")
        is_read = True
        assert all(t.info.nbytes < 10**6 for t in found.tensors.values())
        evaluated(found.tensors)
        with suppress(ConvertError):
            evaluated(Gather(lora_alpha=8)(found.replace(config={"a": 1}), Context()).tensors)
    with suppress(ConvertError):
        evaluated(adam_moments(run, which="exp_avg"))
    SOURCE.survey(run)
    return is_read


@pytest.mark.parametrize("name", ["nested-n4", "accelerate-lora-n2", "odd-grid-n4"])
def test_mutated_files_give_a_checkpoint_or_a_refusal(tmp_path: Path, name: str) -> None:
    dice = random.Random(sum(map(ord, name)))
    run = Path(shutil.copytree(RUNS / name, tmp_path / name))
    files = sorted(p for p in run.rglob("*") if p.name == ".metadata" or p.suffix == ".distcp")
    metadata = [p for p in files if p.name == ".metadata"]
    began, outcomes = time.monotonic(), []
    while time.monotonic() - began < SECONDS / 3 or len(outcomes) < 8:
        path = dice.choice(metadata if dice.random() < 0.7 else files)
        raw = path.read_bytes()
        path.write_bytes(_mutated(raw, dice))
        start = time.monotonic()
        outcomes.append(_use_everything(run))
        assert time.monotonic() - start < 20
        path.write_bytes(raw)
    assert _use_everything(run)
