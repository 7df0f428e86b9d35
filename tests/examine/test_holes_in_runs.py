"""One harm to a run, or to a part of a quantised weight, is named, and nothing else than before is written."""

from __future__ import annotations

import warnings

import pytest

import harmed_quantised
import harmed_runs
import quantised

SEED = 20_000
RUNS_USUAL, RUNS_EVERY = 24, 1_400
FORMS = sorted(quantised.KINDS)
QUANTISED_USUAL, QUANTISED_EVERY = 20, 400


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> harmed_runs.Sound:
    return harmed_runs.Sound(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> harmed_quantised.Sound:
    return harmed_quantised.Sound(tmp_path_factory.mktemp("quantised"))


@pytest.fixture(autouse=True)
def _of_meshes() -> object:
    """Torch warns of a mesh of ranks that is read where no ranks are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


Outcomes = list[harmed_runs.Outcome | None] | list[harmed_quantised.Outcome | None]


def expect_named(outcomes: Outcomes, least: int) -> None:
    assert [f"{o.case}: {o.kind} {o.place}: {o.wrong}" for o in outcomes if o is not None and o.wrong] == []
    assert sum(o is not None for o in outcomes) >= least


def test_a_harm_to_a_run_is_named_and_not_gathered(runs: harmed_runs.Sound) -> None:
    few = [p for p in harmed_runs.RUNS if p.name in ("reward-z2-n2", "lm-tied-z3-n2", "accelerate-n2")]
    few += [p for p in harmed_runs.RUNS if p.name in ("critic-fsdp1-n3", "old-qwen2-tp2-pp2")]
    kinds = sorted(harmed_runs.HARMS)
    found = [harmed_runs.case(runs, few[k % len(few)], SEED + k, kinds[k % len(kinds)]) for k in range(RUNS_USUAL)]
    expect_named(found, RUNS_USUAL // 4)


@pytest.mark.slow
def test_every_one_of_many_harms_to_runs_is_named_and_not_gathered(runs: harmed_runs.Sound) -> None:
    found = [harmed_runs.case(runs, run, seed) for run, seed in harmed_runs.cases(RUNS_EVERY, SEED)]
    expect_named(found, RUNS_EVERY // 4)


def test_a_harm_to_a_part_of_a_quantised_weight_is_named(folders: harmed_quantised.Sound) -> None:
    few = [f for f in FORMS if f in ("nf4-nested", "gptq", "packed")]
    kinds = harmed_quantised.KINDS
    found = [
        harmed_quantised.case(folders, few[k % len(few)], SEED + k, kinds[k % len(kinds)])
        for k in range(QUANTISED_USUAL)
    ]
    expect_named(found, QUANTISED_USUAL // 3)


@pytest.mark.slow
def test_every_one_of_many_harms_to_quantised_weights_is_named(folders: harmed_quantised.Sound) -> None:
    found = [harmed_quantised.case(folders, FORMS[k % len(FORMS)], SEED + k) for k in range(QUANTISED_EVERY)]
    expect_named(found, QUANTISED_EVERY // 3)
