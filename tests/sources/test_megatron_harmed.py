"""Megatron's checkpoints with bytes changed or cut away: the same weights or a refusal, never a crash."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from converter.errors import ConvertError
from converter.sources.megatron.source import SOURCE
from mcore.compare import RUNS, shards
from zero.compare import differences, evaluated

QWEN2, OLD = RUNS / "qwen2-tied-tp2-pp2", RUNS / "old-qwen2-tp2-pp2"


def _harms(size: int, count: int) -> list[tuple[str, int]]:
    """Bits to flip and places to cut at, the same ones each time."""
    draw = random.Random(f"{size}")
    return [("flip", draw.randrange(size)) for _ in range(count)] + [("cut", draw.randrange(size)) for _ in range(4)]


@pytest.mark.parametrize(
    ("run", "file", "count"),
    [
        (QWEN2, ".metadata", 16),
        (QWEN2, "common.pt", 4),
        (QWEN2, "metadata.json", 4),
        (QWEN2, "__0_0.distcp", 6),
        (OLD, "mp_rank_01_000/model_optim_rng.pt", 6),
    ],
)
def test_a_harmed_file_gives_the_same_weights_or_a_refusal(tmp_path: Path, run: Path, file: str, count: int) -> None:
    folder = Path(shutil.copytree(shards(run), tmp_path / "iter_0000010"))
    path = folder / file
    whole = path.read_bytes()
    wanted = evaluated(SOURCE.open(folder, asked="x").tensors)
    refused = 0
    for how, at in _harms(len(whole), count):
        path.write_bytes(whole[:at] if how == "cut" else whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            found = SOURCE.open(folder, asked="x")
        except ConvertError:
            refused += 1
            continue
        if found.tensors.keys() == wanted.keys() and not file.endswith((".distcp", ".pt")):
            assert differences(evaluated(found.tensors), wanted) == [], (how, at)
    assert refused > 1


def test_values_that_were_changed_fail_their_checksum_and_nothing_is_written(tmp_path: Path) -> None:
    from oracle.command import run

    folder = Path(shutil.copytree(QWEN2, tmp_path / "run"))
    path = shards(folder) / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    found = SOURCE.open(shards(folder), asked="x")
    (check, *_) = [c for c in found.checks if c.file.endswith("__0_0.distcp")]
    raw[check.offset] ^= 1
    path.write_bytes(raw)
    done = run("gather", folder, tmp_path / "out")
    assert done.code in (3, 4), done.out
    assert not (tmp_path / "out").exists()
