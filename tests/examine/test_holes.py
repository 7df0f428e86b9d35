"""One tensor lost, cut, renamed, swapped or zeroed is named, and no verb writes it: the frameworks' reports judge."""

from __future__ import annotations

import pytest

from healthy.models import MODELS
from holes import MERGED_HERE, MODEL_HARMS, Outcome, Sound, adapter_case, drawn, model_case, model_cases

SEED = 20_000
EVERY, USUAL, BATCHES = 2_000, 210, 10
"""Cases over models: in the usual run two harms to each, of every kind."""
ADAPTER_EVERY, ADAPTER_USUAL = 100, 10
"""Cases over each adapter."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def expect_named(outcomes: list[Outcome | None]) -> None:
    assert [f"{o.case}: {o.harm}: {o.wrong}" for o in outcomes if o is not None and o.wrong] == []
    assert sum(o is not None for o in outcomes) >= len(outcomes) // 2  # most harms count


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_harm_to_a_model_is_named_and_refused(
    batch: int, sound: Sound, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = list(model_cases(EVERY, SEED))[:USUAL]
    assert {saved for saved, _ in cases} == set(MODELS)
    assert {drawn(saved, seed)[0] for saved, seed in cases} == set(MODEL_HARMS)
    expect_named([model_case(sound, saved, seed, judge_all=False) for saved, seed in cases[batch::BATCHES]])


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_one_of_more_harms_to_a_model_is_named_and_refused(
    batch: int, sound: Sound, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = list(model_cases(EVERY, SEED))[USUAL:]
    expect_named([model_case(sound, saved, seed) for saved, seed in cases[batch::BATCHES]])


@pytest.mark.parametrize("name", MERGED_HERE)
def test_every_harm_to_an_adapter_is_named_and_refused(
    name: str, sound: Sound, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_named([adapter_case(sound, MERGED_HERE[name], SEED + n, judge_all=False) for n in range(ADAPTER_USUAL)])


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED_HERE)
def test_every_one_of_more_harms_to_an_adapter_is_named_and_refused(
    name: str, sound: Sound, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_named([adapter_case(sound, MERGED_HERE[name], SEED + n) for n in range(ADAPTER_USUAL, ADAPTER_EVERY)])
