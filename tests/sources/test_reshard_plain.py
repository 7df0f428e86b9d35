"""`reshard --zero 0`: one file with what lived, in the form that DeepSpeed writes without ZeRO.

Oracles: what lived when real DeepSpeed saved the stored runs, and the keys of a file that it saved without ZeRO.
`tests/runs/run_zero_random.py` lets real DeepSpeed load such files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from converter.core.writer.write import write
from converter.errors import ConvertError
from converter.recipe.verbs.reshard_state import ReshardRequest, plan_state
from converter.sources.deepspeed.source import SOURCE
from durability import Quiet, fast_folder
from saved_trees import loaded
from zero.compare import RUNS, differences, evaluated, live

SCALE = ["dynamic_loss_scale", "cur_scale", "cur_iter"]
DYNAMIC = ["last_overflow_iter", "scale_factor", "scale_window"]


@pytest.fixture
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def written(run: Path, out: Path) -> Any:
    made = plan_state(ReshardRequest(str(run), None, stage=0), revision=None, token=None, keep_code=False)
    write(made.plan, out, reporter=Quiet())
    folder = out / "global_step2"
    assert [p.name for p in folder.iterdir()] == ["mp_rank_00_model_states.pt"]
    return loaded(folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("name", ["lm-tied-z3-n2", "lm-fp16-z1-n2", "lora-z1-n2", "neox-z2-n2"])
def test_states_are_those_that_lived(name: str, place: Path) -> None:
    run = RUNS / name
    state = written(run, place / "out")
    inner = state["optimizer"]["optimizer_state_dict"]
    order = [n for n in written_order(run) if n in live(run, "master")]
    masters = dict(zip(order, [t.detach() for g in state["optimizer"]["fp32_groups"] for t in g], strict=True))
    assert differences(masters, {n: live(run, "master")[n] for n in order}) == []
    for key in ("exp_avg", "exp_avg_sq"):
        made = {n: inner["state"][i][key] for i, n in enumerate(order)}
        assert differences(made, {n: live(run, key)[n] for n in order}) == []
    assert {float(s["step"]) for s in inner["state"].values()} == {2.0}


def written_order(run: Path) -> list[str]:
    """Names of the trained parameters in the order of the model, which the optimizer of these runs got."""
    shapes: list[str] = []
    for file in sorted((run / "global_step2").glob("*model_states.pt"))[:1]:
        shapes = [n for g in loaded(file)["param_shapes"] for n in g]
    return shapes


def test_weights_and_buffers_are_those_that_lived(place: Path) -> None:
    run = RUNS / "subgroups-z3-n3"
    written(run, place / "out")
    assert differences(evaluated(SOURCE.open(place / "out", asked="x").tensors), live(run)) == []


def test_the_file_has_the_keys_that_deepspeed_gives_it(place: Path) -> None:
    own = loaded(RUNS / "plain-z0-n1" / "global_step2" / "mp_rank_00_model_states.pt")
    made = written(RUNS / "lm-tied-z3-n2", place / "out")
    assert list(made) == list(own)
    assert {k for k, v in made.items() if v is None} >= {"param_shapes", "frozen_param_shapes", "shared_params"}
    assert made["ds_config"]["zero_optimization"]["stage"] == 0


def test_a_loss_scale_goes_on(place: Path) -> None:
    """In fp16 it is what the scaler had; in bfloat16 it is 1."""
    half = written(RUNS / "lm-fp16-z1-n2", place / "half")["optimizer"]
    assert list(half) == [*SCALE, *DYNAMIC, "optimizer_state_dict", "fp32_groups"]
    assert (half["dynamic_loss_scale"], half["cur_scale"], half["cur_iter"]) == (True, 16, 2)
    brain = written(RUNS / "reward-z2-n2", place / "brain")["optimizer"]
    assert list(brain) == [*SCALE, "optimizer_state_dict", "fp32_groups"]
    assert (brain["dynamic_loss_scale"], brain["cur_scale"], brain["cur_iter"]) == (False, 1.0, 2)


def test_each_group_keeps_its_settings(place: Path) -> None:
    run = RUNS / "subgroups-z3-n3"
    groups = written(run, place / "out")["optimizer"]["optimizer_state_dict"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1]
    assert json.loads((run / "fixture.json").read_text())["case"] == "subgroups"


def test_elastic_states_are_refused() -> None:
    with pytest.raises(ConvertError) as caught:
        plan_state(
            ReshardRequest(str(RUNS / "elastic-z2-n3"), None, stage=0), revision=None, token=None, keep_code=False
        )
    assert caught.value.code == "zero-elastic"
