"""Weights under a key of a pickled file: transformers stops there, and nobody here calls them sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import converter
from converter.errors import Refused
from small_families import tiny

WAYS: dict[str, Any] = {
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}, "step": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "two levels": lambda state: {"state_dict": {"module": state}},
}


def loaded(folder: Path) -> tuple[set[str], dict[str, torch.Tensor]]:
    """What transformers' load misses, and the tensors that it ends with."""
    kind = transformers.AutoModelForCausalLM
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    return set(told["missing_keys"]), model.state_dict()


def loads(folder: Path) -> bool:
    """Whether transformers finds every weight: it stops at a dictionary, or passes over it."""
    try:
        return not loaded(folder)[0]
    except AttributeError:
        return False


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_it_is_named_and_the_printed_command_writes_what_loads(
    family: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained("m")
    torch.save(WAYS[way](model.state_dict()), "m/pytorch_model.bin")
    assert not loads(Path("m"))

    (found,) = [f for f in converter.doctor("m").findings if f.severity == "error"]
    assert (found.code, str(found.next)) == ("weights-wrapped", "rlhf-convert reshard m m-fixed")
    assert not converter.verify("m", role="actor").holds
    with pytest.raises(Refused, match="lie under"):
        converter.repair("m", "repaired")

    converter.reshard("m", "m-fixed")
    missed, tensors = loaded(Path("m-fixed"))
    assert missed == set()
    assert all(torch.equal(tensors[n], t) for n, t in model.state_dict().items())
    assert [f.code for f in converter.doctor("m-fixed").findings if f.severity == "error"] == []


def test_tensors_at_the_top_are_no_finding(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "weights-wrapped" not in [f.code for f in converter.doctor(tmp_path).findings]
