"""`layer_replication`: a deeper model, which says what PEFT's model of repeated layers says before any merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import converter
import oracle

REPEATED = [[0, 2], [0, 1], [1, 2]]


def with_types_of_layers(model: Any) -> None:
    """PEFT repeats the layers and forgets the list that says what attention each of them has."""
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types * 2


@pytest.mark.parametrize("family", ["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_output_is_the_deeper_model_that_peft_has_in_memory(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family, sharded=True)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, layer_replication=REPEATED)
    wanted = oracle.peft_logits(base, adapter, prepare=with_types_of_layers)
    converter.merge_lora(adapter, tmp_path / "out", base=base.path)
    config = oracle.read_config(tmp_path / "out")
    assert config["num_hidden_layers"] == 4
    assert oracle.relative_difference(oracle.logits(oracle.load_output(tmp_path / "out"), _inputs(base)), wanted) < 1e-6
    held, before = oracle.read_tensors(tmp_path / "out"), oracle.read_tensors(base.path)
    assert len(held) == len(before) + 2 * sum(".layers.0." in n for n in before)
    for new, old in enumerate((0, 1, 0, 1)):
        norm = "input_layernorm.weight"
        assert held[f"model.layers.{new}.{norm}"].equal(before[f"model.layers.{old}.{norm}"])


@pytest.mark.slow
def test_a_layer_that_is_left_out_is_not_in_the_output(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "llama")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, layer_replication=[[1, 2]])
    converter.merge_lora(adapter, tmp_path / "out", base=base.path)
    assert oracle.read_config(tmp_path / "out")["num_hidden_layers"] == 1
    found = oracle.logits(oracle.load_output(tmp_path / "out"), _inputs(base))
    assert oracle.relative_difference(found, oracle.peft_logits(base, adapter)) < 1e-6


def _inputs(base: oracle.Base) -> dict[str, object]:
    return oracle.expected.inputs_for(base)
