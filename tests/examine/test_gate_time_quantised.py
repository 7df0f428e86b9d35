"""The gate's look at the parts of a quantised model of 70B, of which the files are headers and holes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from big_quantised import KINDS, llama_70b
from converter.core.context import Context
from converter.examine.gate import expect_whole
from converter.sources.opening import InputSpec, open_checkpoint

MOST_SECONDS = 1.5
"""Of the processor; where it was written it takes 0.8 s of GPTQ, 0.5 of NF4 and 0.1 of AWQ, others running beside."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_70b_is_judged_in_about_a_second(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(InputSpec(str(llama_70b(tmp_path / kind, kind))), token=None, keep_code=False)
    begun, context = time.process_time(), Context()
    expect_whole(checkpoint, context)
    assert time.process_time() - begun < MOST_SECONDS
    assert context.notes == []
