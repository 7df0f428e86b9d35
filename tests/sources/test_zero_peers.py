"""Where DeepSpeed's own tools lose or confuse weights, ours equal what lived. Needs a Python that has DeepSpeed:

RLHF_CONVERT_DEEPSPEED=PYTHON pytest -m trainer tests/sources/test_zero_peers.py; tests/runs/run_zero_matrix.py builds
one and runs them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import places
from converter.errors import Refused
from converter.sources.deepspeed.source import SOURCE
from converter.sources.deepspeed.universal import SOURCE as UNIVERSAL
from zero.compare import RUNS, differences, evaluated, facts, faults, live, run_names

pytestmark = pytest.mark.trainer
SCRIPT = places.RUNS / "zero" / "peers.py"


def _peer(tool: str, name: str, out: Path) -> Path:
    python = os.environ.get("RLHF_CONVERT_DEEPSPEED")
    assert python, "RLHF_CONVERT_DEEPSPEED must name a Python that has DeepSpeed"
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [python, str(SCRIPT), tool, str(RUNS / name), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def _ours(name: str, *, master: bool = False) -> dict[str, torch.Tensor]:
    return evaluated(SOURCE.open_tag(RUNS / name, asked=name, master=master).tensors)


def test_zero_to_fp32_drops_the_frozen_weights_of_stage_1_and_ours_have_them(tmp_path: Path) -> None:
    theirs = load_file(_peer("zero_to_fp32", "lora-z1-n2", tmp_path) / "model.safetensors")
    lived = live(RUNS / "lora-z1-n2")
    lost = set(lived) - set(theirs)
    assert len(lost) > len(lived) // 2
    assert "base_model.model.model.embed_tokens.weight" in lost
    assert differences(_ours("lora-z1-n2"), lived) == []


def test_zero_to_fp32_refuses_bf16_optimizer_and_ours_equal_the_masters_that_lived(tmp_path: Path) -> None:
    name = "bf16-optimizer-z1-n2"
    assert "is not a zero checkpoint" in (_peer("zero_to_fp32", name, tmp_path) / "error.txt").read_text()
    masters = live(RUNS / name, "master")
    found = _ours(name, master=True)
    assert differences({n: found[n] for n in masters}, masters) == []


def test_zero_to_fp32_widens_whole_weights_and_ours_keep_the_dtype_of_training(tmp_path: Path) -> None:
    theirs = load_file(_peer("zero_to_fp32", "lm-tied-z3-n2", tmp_path) / "model.safetensors")
    assert {t.dtype for t in theirs.values()} == {torch.float32}
    assert {t.dtype for t in _ours("lm-tied-z3-n2").values()} == {torch.bfloat16}
    assert differences(_ours("lm-tied-z3-n2"), live(RUNS / "lm-tied-z3-n2")) == []


def test_universal_confuses_round_robin_and_ours_equal_what_lived_or_are_refused(tmp_path: Path) -> None:
    name = "roundrobin-z2-n3"
    out = _peer("universal", name, tmp_path)
    masters = live(RUNS / name, "master")
    theirs = load_file(out / "fp32.safetensors")
    wrong = [n for n in masters if not theirs[n].equal(masters[n])]
    assert len(wrong) > len(masters) // 2
    found = _ours(name, master=True)
    assert differences({n: found[n] for n in masters}, masters) == []
    with pytest.raises(Refused, match="round_robin_gradients"):
        UNIVERSAL.open_masters(out / "universal", asked="x")
    assert differences(evaluated(UNIVERSAL.open(out / "universal", asked="x").tensors), live(RUNS / name)) == []


_CONVERTED = [
    n for n in run_names() if facts(RUNS / n)["stage"] and facts(RUNS / n)["case"] not in ("elastic", "roundrobin")
]


@pytest.mark.parametrize("name", _CONVERTED)
def test_a_universal_checkpoint_of_any_other_run_equals_what_lived(tmp_path: Path, name: str) -> None:
    assert faults(_peer("universal", name, tmp_path) / "universal") == []
