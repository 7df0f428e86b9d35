"""A keyword that a function does not take is named as the caller wrote it, with the one that was meant."""

from __future__ import annotations

import pytest

import converter


def test_a_mistyped_keyword_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"^unexpected keyword argument 'overwrit'; did you mean 'overwrite'[?]$"):
        converter.merge_lora("adapter", "out", overwrit=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^unexpected keyword argument 'qqq'$"):
        converter.gather("run", "out", qqq=None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^unexpected keyword argument 'from_'"):
        converter.merge_lora("adapter", "out", from_="trl")  # type: ignore[call-arg]
