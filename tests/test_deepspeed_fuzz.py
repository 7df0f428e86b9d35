"""Shards with mutated pickles: a checkpoint or a clean refusal, whatever the numbers and names in them became."""

from __future__ import annotations

import io
import os
import random
import shutil
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from converter.context import Context
from converter.converters.gather import Gather
from converter.errors import ConvertError
from converter.sources.deepspeed import SOURCE, adam_moments, open_tag
from zero.compare import RUNS, evaluated, run_names

SECONDS = float(os.environ.get("FUZZ_SECONDS", "4"))


def _mutated(raw: bytes, dice: random.Random) -> bytes:
    """A torch file whose pickle has a few bytes changed and a sound container around it."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    data = bytearray(entries[name])
    for _ in range(dice.choice((1, 1, 1, 3))):
        at = dice.randrange(len(data))
        if dice.random() < 0.5:
            data[at] ^= 1 << dice.randrange(8)
        else:
            data[at] = dice.choice((0, 1, 2, 7, 127, 255, data[dice.randrange(len(data))]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for each, content in (entries | {name: bytes(data)}).items():
            archive.writestr(each, content)
    return out.getvalue()


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


@pytest.mark.parametrize("name", ["lora-z3-n2", "aligned-z1-n2", "elastic-z2-n3", "plain-z0-n1"])
def test_mutated_shards_give_a_checkpoint_or_a_refusal(tmp_path: Path, name: str) -> None:
    assert name in run_names()
    dice = random.Random(sum(map(ord, name)))
    run = Path(shutil.copytree(RUNS / name, tmp_path / name))
    files = sorted((run / "global_step2").iterdir())
    began, count = time.monotonic(), 0
    while time.monotonic() - began < SECONDS / 4 or count < 5:
        path = dice.choice(files)
        raw = path.read_bytes()
        path.write_bytes(_mutated(raw, dice))
        start = time.monotonic()
        _use_everything(run)
        assert time.monotonic() - start < 20
        path.write_bytes(raw)
        count += 1
