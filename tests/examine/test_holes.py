"""One tensor lost, cut, renamed, swapped or zeroed is named, and no verb writes it: the frameworks' reports judge."""

from __future__ import annotations

import pytest

from holes import MERGED_HERE, Outcome, Sound, adapter_case, model_case, model_cases

CASES, SEED, BATCHES = 400, 20_000, 20
ADAPTER_CASES = 100


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def missed(outcomes: list[Outcome | None]) -> list[str]:
    return [f"{o.case}: {o.harm}: {o.wrong}" for o in outcomes if o is not None and o.wrong]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_harm_to_a_model_is_named_and_refused(
    batch: int, sound: Sound, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = list(model_cases(CASES, SEED))[batch::BATCHES]
    found = [model_case(sound, saved, seed) for saved, seed in mine]
    assert missed(found) == []
    assert sum(o is not None for o in found) >= len(found) // 2  # most harms count


@pytest.mark.parametrize("name", MERGED_HERE)
def test_every_harm_to_an_adapter_is_named_and_refused(
    name: str, sound: Sound, capsys: pytest.CaptureFixture[str]
) -> None:
    count = ADAPTER_CASES // len(MERGED_HERE)
    found = [adapter_case(sound, MERGED_HERE[name], SEED + n) for n in range(count)]
    assert missed(found) == []
    assert sum(o is not None for o in found) >= count // 2
