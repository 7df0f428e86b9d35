"""torchtitan's and torchtune's distributed checkpoints come out as the models of transformers that they were made of.

`tests/runs/dcp/trainer_names.py` made the stored ones with the trainers' own converters; the oracle is transformers'
own state, bit by bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from converter.errors import Refused
from converter.recipe.verbs.gather import gather
from places import TESTS
from zero.compare import differences

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STORED = TESTS / "runs" / "dcp" / "trainer_names"
NAMES = sorted(p.parent.name for p in STORED.glob("*/fixture.json"))


def gathered(run: Path, out: Path) -> dict[str, torch.Tensor]:
    gather(run, out)
    return load_file(out / "model.safetensors")


def refused(run: Path, out: Path) -> str:
    with pytest.raises(Refused) as caught:
        gather(run, out)
    assert caught.value.code == "names-of-trainer"
    assert "--emit state" in str(caught.value.next)
    return caught.value.what


@pytest.mark.parametrize("name", NAMES)
def test_names_and_rows_are_those_of_transformers_bit_by_bit(name: str, tmp_path: Path) -> None:
    wanted = load_file(STORED / name / "oracle.safetensors")
    assert differences(gathered(STORED / name, tmp_path / "out"), wanted) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "is not known"),
        ({"num_attention_heads": 8, "head_dim": 4}, "8 heads of 4"),
        ({"num_attention_heads": None}, "has no num_attention_heads"),
    ],
)
def test_a_config_that_is_not_the_models_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(STORED / "titan-llama", tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    assert words in refused(run, tmp_path / "out")


def written(state: dict[str, torch.Tensor], like: str, run: Path) -> Path:
    """A checkpoint of a state, with the config of a stored one."""
    dcp.save({"model": state}, checkpoint_id=str(run / "step-1"), no_dist=True)
    shutil.copy(STORED / like / "config.json", run)
    return run


def old_titan(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of torchtitan before 0.3.0."""
    names = {"lm_head.weight": "output.weight"}
    return {names.get(n, n.replace("attention.qkv_linear.", "attention.")): t for n, t in state.items()}


def stored_state(name: str) -> dict[str, torch.Tensor]:
    wanted = load_file(STORED / name / "oracle.safetensors")
    state = {n: torch.zeros_like(t) for n, t in _titan_shapes(wanted).items()}
    dcp.load(state, checkpoint_id=str(STORED / name / "step-2"), no_dist=True)
    return state


def _titan_shapes(oracle: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    metadata = dcp.FileSystemReader(str(STORED / "titan-llama" / "step-2")).read_metadata()
    kinds = {n: m for n, m in metadata.state_dict_metadata.items() if hasattr(m, "size")}
    dtype = next(iter(oracle.values())).dtype
    return {n: torch.empty(m.size, dtype=dtype) for n, m in kinds.items()}


def test_names_of_older_versions_of_torchtitan_are_known_and_tables_of_positions_left_out(tmp_path: Path) -> None:
    state = old_titan(stored_state("titan-llama")) | {"freqs_cis": torch.ones(4)}
    run = written(state, "titan-llama", tmp_path / "run")
    wanted = load_file(STORED / "titan-llama" / "oracle.safetensors")
    assert differences(gathered(run, tmp_path / "out"), wanted) == []


def test_a_tensor_that_the_trainer_does_not_have_is_refused(tmp_path: Path) -> None:
    state = stored_state("titan-llama") | {"layers.0.attention.sinks": torch.ones(4)}
    assert "sinks" in refused(written(state, "titan-llama", tmp_path / "run"), tmp_path / "out")
