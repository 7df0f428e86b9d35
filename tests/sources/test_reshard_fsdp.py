"""accelerate's state under FSDP in its other layout, sharded or full: what torch loads of both is the same.

Oracles: torch's own loading of the runs that accelerate saved, and what lived in them.
`tests/runs/run_fsdp_layouts.py` lets real accelerate go on from what is written.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import converter
from converter.cli import main
from converter.errors import ConvertError
from converter.examine.doctor import DoctorRequest, examine
from converter.sources.dcp.source import SOURCE
from durability import fast_folder
from places import RUNS

SAVED = RUNS / "dcp" / "runs"
MODEL, OPTIMIZER = "pytorch_model_fsdp", "optimizer"


@pytest.fixture
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def full(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.bin", weights_only=True)  # noqa: TID251 - as accelerate does


def sharded(folder: Path, name: str, place: Path) -> Any:
    """What torch makes of a distributed checkpoint, without the key that accelerate puts it under."""
    dcp_to_torch_save(folder / f"{name}_0", place / "whole.pt")
    (value,) = torch.load(place / "whole.pt", weights_only=True).values()  # noqa: TID251 - torch itself wrote it
    return value


def kinds(metadata: Any) -> dict[str, Any]:
    """Kind and shape of each entry, which a loader's planner compares."""
    return {k: (type(v), getattr(v, "size", None)) for k, v in metadata.state_dict_metadata.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(same(a, b) for a, b in pairs)
    return bool(type(one) is type(other) and one == other)


@pytest.mark.parametrize("run", ["accelerate-n2", "fsdp1-n2", "accelerate-lora-n2", "accelerate-adapter-n2"])
def test_a_sharded_state_as_a_full_one_is_what_torch_puts_together(run: str, place: Path) -> None:
    source = SAVED / run / "checkpoint-2"
    converter.reshard_state(source, place / "out", to="full")
    for name in (MODEL, OPTIMIZER):
        assert same(full(place / "out", name), sharded(source, name, place)), name


def test_a_full_state_as_a_sharded_one_is_what_accelerate_saves_so(place: Path) -> None:
    """`accelerate-n2` is of the same model, so that its planner's keys are those that a loader asks for."""
    source = SAVED / "accelerate-full-n2" / "checkpoint-2"
    converter.reshard_state(source, place / "out", to="sharded")
    for name in (MODEL, OPTIMIZER):
        assert same(sharded(place / "out", name, place), full(source, name)), name
        asked, written = (
            FileSystemReader(root / f"{name}_0").read_metadata()
            for root in (SAVED / "accelerate-n2" / "checkpoint-2", place / "out")
        )
        assert kinds(asked) == kinds(written)
        assert asked.planner_data == written.planner_data


def test_there_and_back_are_the_tensors_and_groups_that_were_saved(place: Path) -> None:
    source = SAVED / "accelerate-full-n2" / "checkpoint-2"
    converter.reshard_state(source, place / "there", to="sharded")
    converter.reshard_state(place / "there", place / "back", to="full")
    for name in (MODEL, OPTIMIZER):
        assert same(full(place / "back", name), full(source, name))


def test_weights_and_moments_are_those_that_lived(place: Path) -> None:
    converter.reshard_state(SAVED / "accelerate-n2", place / "out", to="full")
    lived = load_file(SAVED / "accelerate-n2" / "oracle.safetensors")
    weights, states = full(place / "out", MODEL), full(place / "out", OPTIMIZER)["state"]
    found = {f"live/{n}": t for n, t in weights.items()}
    found |= {f"{k}/{n}": s[k] for n, s in states.items() for k in ("exp_avg", "exp_avg_sq")}
    assert found.keys() == lived.keys()
    assert [n for n in found if not torch.equal(found[n], lived[n])] == []
    assert weights["lm_head.weight"].dtype == torch.float32


def test_what_a_trainer_reads_beside_it_comes_along(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(SAVED / "accelerate-n2", place / "run"))
    state = run / "checkpoint-2"
    (state / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    torch.save({"last_epoch": 2}, state / "scheduler.pt")
    torch.save({"last_epoch": 2}, state / "scheduler.bin")
    rng = {"step": 2, "random_state": random.getstate(), "numpy_random_seed": np.random.get_state()}
    for rank in (0, 1):
        torch.save(rng, state / f"random_states_{rank}.pkl")
    torch.save({"seen": 3}, state / "notes.bin")
    assert main(["reshard", str(run), str(place / "out"), "--to", "full"]) == 0
    screen = capsys.readouterr().out
    assert "not carried along: notes.bin" in screen
    assert f"FULL_STATE_DICT and --resume_from_checkpoint {place / 'out'}" in screen
    for name in ("trainer_state.json", "scheduler.pt", "scheduler.bin", "random_states_0.pkl", "random_states_1.pkl"):
        assert (place / "out" / name).read_bytes() == (state / name).read_bytes(), name
    receipt = json.loads((place / "out" / "rlhf-convert.json").read_text())
    assert receipt["recipe"] == {"reshard": {"to": "full"}}


def test_two_models_and_their_optimizers_keep_their_numbers(place: Path) -> None:
    state = Path(shutil.copytree(SAVED / "accelerate-n2" / "checkpoint-2", place / "checkpoint-2"))
    for name in (MODEL, OPTIMIZER):
        shutil.copytree(SAVED / "fsdp1-n2" / "checkpoint-2" / f"{name}_0", state / f"{name}_1")
    converter.reshard_state(state, place / "out", to="full")
    assert len(full(place / "out", f"{MODEL}_1")) == 3
    assert same(full(place / "out", MODEL), sharded(state, MODEL, place))


@pytest.mark.parametrize("ranks", [1, 3])
def test_files_of_ranks_are_cut_for_others_bit_by_bit(ranks: int, place: Path) -> None:
    run = SAVED / "accelerate-ranks-n2"
    converter.reshard_state(run, place / "out", world_size=ranks)
    assert len(list((place / "out").glob("pytorch_model_fsdp_0_rank*.bin"))) == ranks
    lived = load_file(run / "oracle.safetensors")
    found = {f"live/{n}": t for n, t in SOURCE.open(place / "out", asked="x").tensors.items()}
    for which in ("exp_avg", "exp_avg_sq"):
        found |= {f"{which}/{n}": t for n, t in SOURCE.adam_moments(place / "out", which=which).items()}  # type: ignore[arg-type]
    assert found.keys() == lived.keys()
    assert [n for n in found if not torch.equal(converter.to_torch(found[n]), lived[n])] == []


def test_doctor_says_that_files_of_ranks_have_to_be_cut_for_others() -> None:
    run = SAVED / "accelerate-ranks-n2"
    for ranks, severity in ((3, "changes-numbers"), (2, "cosmetic")):
        (found,) = (f for f in examine(DoctorRequest(str(run), resume_on=ranks)).findings if f.code == "resume-on")
        assert found.severity == severity
        assert ("--world-size 3" in str(found.next)) is (ranks == 3)


def refused(source: Path, to: str, **given: Any) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        converter.reshard_state(source, to=to, **given)
    return caught.value


HARM = {
    "a file of weights is missing": ("pytorch_model_fsdp_0/__1_0.distcp", None, "dcp-file-missing"),
    "a file of moments is missing": ("optimizer_0/__1_0.distcp", None, "dcp-file-missing"),
    "a file of moments is cut short": ("optimizer_0/__1_0.distcp", 0.5, "file-truncated"),
    "metadata is missing": ("optimizer_0/.metadata", None, "dcp-metadata-missing"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_state_that_is_not_whole_is_refused(harm: str, place: Path) -> None:
    state = Path(shutil.copytree(SAVED / "accelerate-n2" / "checkpoint-2", place / "checkpoint-2"))
    name, share, code = HARM[harm]
    if share is None:
        (state / name).unlink()
    else:
        os.truncate(state / name, int((state / name).stat().st_size * share))
    assert refused(state, "full").code == code


def test_what_is_no_state_of_accelerate_s_is_refused_by_name(place: Path) -> None:
    assert refused(SAVED / "accelerate-n2", "sharded").code == "usage"
    assert refused(SAVED / "accelerate-n2", "full", world_size=3).code == "usage"
    assert refused(SAVED / "nested-n4", "full").code == "reshard-kind"
    state = Path(shutil.copytree(SAVED / "accelerate-full-n2" / "checkpoint-2", place / "checkpoint-2"))
    optimizer = full(state, OPTIMIZER)
    torch.save({**optimizer, "state": dict(enumerate(optimizer["state"].values()))}, state / "optimizer.bin")
    assert (refused(state, "sharded").code, "numbered" in refused(state, "sharded").what) == ("fsdp-state", True)
    torch.save({**optimizer, "made": Path.unlink}, state / "optimizer.bin")
    assert refused(state, "sharded").code == "pickle-names"
    shutil.copytree(SAVED / "accelerate-n2" / "checkpoint-2" / f"{MODEL}_0", state / f"{MODEL}_0")
    assert "both layouts" in refused(state, "sharded").what
