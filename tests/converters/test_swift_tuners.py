"""Adapters of ms-swift's own tuners: names without PEFT's prefix, the adapter's name in each, fields of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import converter
import oracle
from converter.errors import Refused
from oracle.adapters import CONFIG

FIELDS: dict[str, Any] = {
    "swift_type": "LORA", "enable_lora": None, "lora_dtype": None, "lorap_emb_lr": 1e-06, "lorap_lr_ratio": 16.0,
    "model_key_mapping": None, "use_merged_linear": False, "use_qa_lora": False, "base_model_name_or_path": None,
}  # fmt: skip
"""What ms-swift 4.6.0 writes beside PEFT's own fields (`Swift.prepare_model(model, {"default": LoRAConfig(...)})`)."""


def as_swift_saves(adapter: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    held = load_file(adapter / "adapter_model.safetensors")
    renamed = {k.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for k, t in held.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    config = json.loads((adapter / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != "task_type"} | FIELDS | changes))
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_an_adapter_of_ms_swifts_own_tuner_is_merged_as_pefts(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    expected = oracle.peft_merge(base, adapter)
    converter.merge_lora(as_swift_saves(adapter, tmp_path / "swift"), tmp_path / "out", base=base.path, numerics="peft")
    found = oracle.read_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change", [{"use_merged_linear": True}, {"swift_type": "LONGLORA"}], ids=["merged", "longlora"]
)
def test_what_has_other_arithmetic_is_refused_by_its_field(change: dict[str, Any], tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "llama")
    adapter = as_swift_saves(oracle.make_adapter(tmp_path / "adapter", base), tmp_path / "swift", **change)
    with pytest.raises(Refused, match=next(iter(change))):
        converter.merge_lora(adapter, tmp_path / "out", base=base.path)
    assert not (tmp_path / "out").exists()
