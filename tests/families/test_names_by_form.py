"""Names that differ in their numbers alone are looked up by form; a pattern that wants one number is asked again."""

from __future__ import annotations

import pytest

from converter.families.memory_names import Architecture, architecture


def built(name: str) -> Architecture:
    """A class of transformers with nothing set."""
    found = architecture(name, {})
    assert found is not None
    return found


@pytest.mark.parametrize("layer", [0, 12, 909])
@pytest.mark.parametrize("expert", [0, 7, 255])
def test_an_expert_of_any_layer_becomes_a_part_of_that_layers_stack(layer: int, expert: int) -> None:
    model = built("MixtralForCausalLM")
    for _ in range(2):  # worked out, then looked up
        for leaf, stack in (("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.weight"
            assert model.renamed(name) == f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight"
            assert model.in_memory(name)[0] == f"model.layers.{layer}.mlp.experts.{stack}"


def test_a_number_that_a_pattern_asks_for_is_not_taken_for_any_number() -> None:
    model = built("BeitBackbone")
    assert model.renamed("fpn1.0.weight") == "fpn.fpn1.conv_transpose1.weight"
    assert model.renamed("fpn1.1.weight") == "fpn.fpn1.normalization.weight"
    assert model.renamed("fpn1.2.weight") == "fpn1.2.weight"


def test_a_number_that_looks_like_a_stand_in_stays_as_it_is() -> None:
    model = built("MixtralForCausalLM")
    name = "model.layers.9090901.block_sparse_moe.experts.3.w2.weight"
    assert model.in_memory(name)[0] == "model.layers.9090901.mlp.experts.down_proj"
