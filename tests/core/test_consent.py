"""What a user consents to: one code at a time, and the receipt keeps it. What counts as zero when it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converter.core.context import Context
from converter.errors import Refused
from small_models import open_model, save_model


def refusal() -> Refused:
    return Refused("no-op", "nothing would change")


def test_without_consent_a_refusal_says_that_there_may_be_one() -> None:
    with pytest.raises(Refused, match="nothing would change") as caught:
        Context().consent(refusal())
    assert caught.value.consent


def test_consent_to_another_code_is_none() -> None:
    context = Context(allow=frozenset({"untie", "no-o", "no-op2"}))
    with pytest.raises(Refused, match="nothing would change"):
        context.consent(refusal())
    assert context.consents == {}


def test_a_consent_that_was_needed_is_kept_with_its_words_and_another_is_not() -> None:
    context = Context(allow=frozenset({"no-op", "untie"}))
    context.consent(refusal())
    assert context.consents == {"no-op": "nothing would change"}


ZERO = {
    "zeros": torch.zeros(3, 4),
    "negative zeros": -torch.zeros(3, 4),
    "negative zeros in bfloat16": -torch.zeros(5, dtype=torch.bfloat16),
    "zeros of both signs": torch.tensor([0.0, -0.0] * 4, dtype=torch.float16),
    "integers": torch.zeros(3, dtype=torch.int32),
}
NOT_ZERO = {
    "the smallest number": torch.tensor([0.0, 1e-45]),
    "its negative": torch.tensor([0.0, -1e-45]),
    "a negative number of one bit": torch.tensor([-2.0, 0.0], dtype=torch.bfloat16),
    "the last element": torch.tensor([0.0] * 1000 + [1.0]),
    "an integer whose highest bit is set": torch.tensor([-(2**31)], dtype=torch.int32),
    "128 as a byte": torch.tensor([128], dtype=torch.uint8),
}


@pytest.mark.parametrize("name", [*ZERO, *NOT_ZERO])
def test_a_tensor_is_zero_where_torch_finds_no_other_value(name: str, tmp_path: Path) -> None:
    tensor = {**ZERO, **NOT_ZERO}[name]
    assert (not tensor.any()) == (name in ZERO)
    given = open_model(save_model(tmp_path / "model", {"x": tensor}))
    assert Context().is_zero(given.tensors["x"]) == (name in ZERO)
