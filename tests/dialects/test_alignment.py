"""What a dialect says of positions and sizes, against the survey: no file shows it, and loaders differ in it.

Sources: OpenRLHF 0.11.2 `models/model.py` and SkyRL 0.3.0 `model_wrapper.py` drop the last position's value
(`[:, :-1]`); verl, TRL and AReaL keep all. DeepSpeed-Chat resizes embeddings to a multiple of 8 (`model_utils.py`).
"""

from __future__ import annotations

import pytest

from converter.dialects.known import dialects, target

DROP_LAST = {"openrlhf", "openrlhf-old", "skyrl"}


@pytest.mark.parametrize("name", sorted(dialects()))
def test_only_openrlhf_s_and_skyrl_s_critics_have_no_value_at_the_last_position(name: str) -> None:
    assert dialects()[name].alignment == ("drop-last" if name in DROP_LAST else "all")


@pytest.mark.parametrize("name", sorted(dialects()))
def test_only_deepspeed_chat_resizes_embeddings_and_to_a_multiple_of_8(name: str) -> None:
    assert dialects()[name].vocab_multiple == (8 if name in ("dschat", "dschat-old") else 1)


@pytest.mark.parametrize(
    ("trainer", "alignment"),
    [("skyrl", "drop-last"), ("openrlhf", "drop-last"), ("verl", "all"), ("trl-valuehead", "all"), ("areal", "all")],
)
def test_a_trainer_s_critic_has_the_alignment_of_its_code(trainer: str, alignment: str) -> None:
    assert target(trainer, "critic").dialect.alignment == alignment
