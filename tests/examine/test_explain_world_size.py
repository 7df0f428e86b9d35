"""What DeepSpeed says of another number of ranks leads to the command that rewrites the state for them."""

from __future__ import annotations

import pytest

from converter.cli import main

SAID = (
    "deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a DP world size of 4 but the "
    "current world size is 2. Automatic adjustment of ZeRO's optimizer state partitioning with a new world size is not "
    "currently supported."
)


def test_the_message_of_a_wrong_world_size_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", SAID]) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "world-size-changed" in screen
    assert "another number of ranks (4)" in screen
    assert "that there are now (2)" in screen
    assert "rlhf-convert reshard DIR OUT --world-size RANKS" in screen
