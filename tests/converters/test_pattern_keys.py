"""`rank_pattern` and `alpha_pattern`: which pattern a module takes is PEFT's own rule."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from converter.converters.merge.patterns import matching

MODULES = [
    "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "layers.1.q_proj", "q_proj", "xq_proj",
    "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj.inner", "model.score",
]  # fmt: skip
PATTERNS = [
    "q_proj", "1.self_attn.q_proj", "layers.1.self_attn.q_proj", "proj", r".*\.1\..*", "model.layers.1.mlp.up_proj",
    "^model.layers.1.mlp.up_proj", "attn.q_proj", r"layers\.\d+\.self_attn\.q_proj", "score|q_proj", "_proj",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_modules_that_peft_s_rule_matches(pattern: str) -> None:
    hits = {m for m in MODULES if get_pattern_key([pattern], m) == pattern}
    assert {m for m in MODULES if matching({pattern: 3}, m, 8) == 3} == hits


def test_of_several_patterns_the_first_wins() -> None:
    patterns = {"self_attn.q_proj": 2, "q_proj": 4}
    found = [matching(patterns, m, 8) for m in ("layers.0.self_attn.q_proj", "layers.0.q_proj", "k_proj")]
    assert found == [2, 4, 8]
