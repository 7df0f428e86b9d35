"""Adam's moments through the library, from any trainer's checkpoint that keeps them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import converter
import places
from converter.errors import ConvertError
from shards import edit
from zero.compare import RUNS, differences, live

UNIVERSAL = places.RUNS / "zero" / "universal_runs"


def _refused(path: Path, code: str, allow: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConvertError) as caught:
        converter.adam_moments(path, which="exp_avg", allow=allow)
    assert caught.value.code == code, caught.value
    return str(caught.value)


@pytest.mark.parametrize("run", [RUNS / "subgroups-z3-n3", RUNS / "roundrobin-z2-n3", UNIVERSAL / "lora-z3-n2"])
def test_both_moments_of_any_trainers_folder_equal_those_in_memory(run: Path) -> None:
    for which in ("exp_avg", "exp_avg_sq"):
        found = converter.adam_moments(run, which=which)
        wanted = {n: t for n, t in live(run, which).items() if n in found}
        assert differences({n: converter.to_torch(t) for n, t in found.items()}, wanted) == []
        assert len(wanted) >= 8


def test_names_that_the_optimizer_was_given_are_proof_without_zero() -> None:
    run = RUNS / "plain-named-z0-n1"
    found = {n: converter.to_torch(t) for n, t in converter.adam_moments(run, which="exp_avg").items()}
    wanted = live(run, "exp_avg")
    del wanted["twin.weight"]  # a second name of `second.weight`
    assert differences(found, wanted) == []


def test_without_names_an_order_that_only_custom_tells_has_to_be_allowed() -> None:
    run = RUNS / "plain-z0-n1"
    assert 'allow=["moments-order"]' in _refused(run, "moments-order")
    found = converter.adam_moments(run, which="exp_avg_sq", allow=["moments-order"])
    wanted = {n: t for n, t in live(run, "exp_avg_sq").items() if n != "lm_head.weight"}
    assert differences({n: converter.to_torch(t) for n, t in found.items()}, wanted) == []


def _without_names(tmp_path: Path, keep: tuple[int, ...] = tuple(range(9))) -> Path:
    run = Path(shutil.copytree(RUNS / "plain-named-z0-n1", tmp_path / "run"))

    def change(state: dict) -> None:  # type: ignore[type-arg]
        for group in state["optimizer"]["param_groups"]:
            del group["param_names"]
        state["optimizer"]["state"] = {n: s for n, s in state["optimizer"]["state"].items() if n in keep}

    edit(run / "global_step2" / "mp_rank_00_model_states.pt", change)
    return run


def test_a_shape_in_several_groups_or_partly_frozen_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    assert "they were in several groups" in _refused(_without_names(tmp_path), "moments-ambiguous", ("moments-order",))
    run = _without_names(tmp_path / "frozen", keep=(0, 1, 2))
    assert "some were frozen" in _refused(run, "moments-ambiguous", ("moments-order",))


def test_moments_of_another_model_and_no_moments_are_refused(tmp_path: Path) -> None:
    run = _without_names(tmp_path, keep=())
    _refused(run, "zero-no-masters")
    run = _without_names(tmp_path / "other")

    def change(state: dict) -> None:  # type: ignore[type-arg]
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(99)

    edit(run / "global_step2" / "mp_rank_00_model_states.pt", change)
    _refused(run, "zero-sizes")


@pytest.mark.parametrize("names", [[["a"]] * 4, [3] * 4, ["scale"] * 3, ["nowhere"] * 4])
def test_names_that_are_none_of_the_model_prove_nothing(tmp_path: Path, names: list[object]) -> None:
    run = Path(shutil.copytree(RUNS / "plain-named-z0-n1", tmp_path / "run"))

    def change(state: dict) -> None:  # type: ignore[type-arg]
        state["optimizer"]["param_groups"][0]["param_names"] = names

    edit(run / "global_step2" / "mp_rank_00_model_states.pt", change)
    _refused(run, "moments-ambiguous")


def test_a_folder_without_moments_is_refused_by_name(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "no-such-folder")
    _refused(tmp_path, "no-shards")
