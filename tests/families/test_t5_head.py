"""T5's output embedding is the shared one where config.json ties them or is silent, also where it is stored."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from converter.families.ties import find_ties

SIZES = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 24}


@pytest.mark.parametrize("flag", [True, None])
def test_a_stored_head_of_t5_is_tied_where_transformers_ties_it(flag: bool | None) -> None:
    said = {} if flag is None else {"tie_word_embeddings": flag}
    model = T5ForConditionalGeneration(T5Config(**SIZES, **said))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    same = {n for n, p in parameters.items() if p is parameters["shared.weight"]}
    assert "lm_head.weight" in same
    config: dict[str, object] = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    config |= {} if flag is None else {"tie_word_embeddings": flag}
    (group,) = find_ties(list(parameters), config)
    assert set(group) == same
    assert torch.equal(parameters[group[0]], parameters["shared.weight"])
