"""`reshard --to universal` writes what DeepSpeed's own ds_to_universal wrote of the same run, and what lived."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import converter
from converter.cli import main
from converter.errors import Refused
from durability import fast_folder
from saved_trees import differences, loaded
from zero.compare import RUNS, live

THEIRS = RUNS.parent / "universal_runs"
TAG = "global_step2_universal"


@pytest.fixture
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def test_every_file_says_what_that_of_ds_to_universal_says(place: Path) -> None:
    name = "lora-z3-n2"
    converter.reshard_state(RUNS / name, place / "out", to="universal")
    theirs, ours = THEIRS / name / TAG, place / "out" / TAG
    files = sorted(str(p.relative_to(theirs)) for p in theirs.rglob("*.pt"))
    assert sorted(str(p.relative_to(ours)) for p in ours.rglob("*.pt")) == files
    for file in files:
        one, other = loaded(theirs / file), loaded(ours / file)
        if file.endswith("optimizer_state.pt"):  # theirs has the first rank's shares of masters and moments in it too
            assert one.pop("fp32_flat_groups")
            state = one["optimizer_state_dict"]["state"]
            one["optimizer_state_dict"]["state"] = {0: {"step": state[0]["step"]}}
        assert list(differences(one, other)) == [], file
    assert (place / "out" / "latest_universal").read_text() == TAG


@pytest.mark.parametrize("name", ["aligned-z1-n2", "reward-z2-n2", "subgroups-z3-n3", "lora-frozen-head-z3-n2"])
def test_whole_masters_and_moments_are_those_that_lived(name: str, place: Path) -> None:
    converter.reshard_state(RUNS / name, place / "out", to="universal")
    zero = place / "out" / TAG / "zero"
    again = loaded(min((place / "out" / TAG).glob("*model_states.pt")))["shared_params"]  # second names of shared ones
    for kind, key in {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}.items():
        lived = {n: t for n, t in live(RUNS / name, kind).items() if n not in again}
        assert {p.parent.name for p in zero.glob(f"*/{key}.pt")} == lived.keys()
        for parameter, expected in lived.items():
            found = loaded(zero / parameter / f"{key}.pt")
            whole = found if "-z3-" in name else found["param"]
            assert torch.equal(whole, expected.flatten() if "-z3-" in name else expected), (parameter, key)
    steps = {float(loaded(p)) for p in zero.glob("*/step.pt")}
    assert steps == (set() if "-z3-" in name else {2.0})


def test_more_ranks_of_stage_3_get_model_files_of_their_own(place: Path) -> None:
    converter.reshard_state(RUNS / "lora-frozen-head-z3-n2", place / "out", to="universal", world_size=5)
    models = [loaded(p) for p in sorted((place / "out" / TAG).glob("*model_states.pt"))]
    assert [m["dp_world_size"] for m in models] == [5] * 5


@pytest.mark.parametrize(
    ("name", "says"), [("roundrobin-z2-n3", "round_robin_gradients"), ("bf16-optimizer-z1-n2", "no loss scaler")]
)
def test_what_deepspeed_would_load_wrong_is_refused(name: str, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        converter.reshard_state(RUNS / name, to="universal")
    assert caught.value.code == "zero-universal"


def test_options_that_contradict_are_usage_errors(place: Path) -> None:
    run = str(RUNS / "reward-z2-n2")
    assert main(["reshard", run, str(place / "x"), "--to", "universal", "--stage", "1"]) == 2
    assert main(["reshard", run, str(place / "x"), "--to", "universal", "--dequantize"]) == 2
    assert list(place.iterdir()) == []


def test_a_universal_checkpoint_is_said_to_load_on_any_ranks() -> None:
    """It is not made universal again; with `world_size` alone it becomes files of ranks."""
    with pytest.raises(Refused, match="load_universal") as caught:
        converter.reshard_state(THEIRS / "lora-z3-n2", world_size=3, to="universal")
    assert caught.value.code == "reshard-any-ranks"
