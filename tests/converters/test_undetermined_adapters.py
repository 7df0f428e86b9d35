"""Adapters whose arithmetic no file determines: refused, with the adapter that a trainer left beside where it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest

import converter
import oracle
from converter.errors import Refused
from oracle.bases import quiet


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> oracle.Base:
    return oracle.make_base(tmp_path_factory.mktemp("undetermined") / "base")


def refused(adapter: Path, base: oracle.Base) -> Refused:
    with pytest.raises(Refused) as caught:
        converter.merge_lora(adapter, base=base.path)
    return caught.value


def test_the_adapter_that_llama_factory_converted_is_named(base: oracle.Base, tmp_path: Path) -> None:
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    shutil.copytree(adapter, tmp_path / "converted")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa_niter_16"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "pissa_converted" not in str(refused(adapter, base))
    (tmp_path / "converted").rename(adapter / "pissa_converted")
    error = refused(adapter, base)
    assert error.code == "adapter-base-moved"
    assert f"merge-lora {adapter}/pissa_converted OUT" in str(error.next)
    assert converter.merge_lora(adapter / "pissa_converted", base=base.path).plan.counts["computed"]


def test_more_reflections_than_inputs_made_orthogonal_are_refused(base: oracle.Base, tmp_path: Path) -> None:
    with quiet():
        model = peft.get_peft_model(base.load(), peft.HRAConfig(r=50, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "adapter")
    edit = tmp_path / "adapter" / "adapter_config.json"
    edit.write_text(json.dumps(json.loads(edit.read_text()) | {"apply_GS": True}))
    error = refused(tmp_path / "adapter", base)
    assert (error.code, "48 inputs, and 50 vectors" in error.what) == ("adapter-ambiguous", True)
