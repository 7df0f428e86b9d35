"""The check after writing finds what a size alone does not show: a header, a config or an index that was changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from converter.errors import VerificationFailed
from durability import Quiet
from small_models import numbers, open_model, plan_of, save_model, written

CHANGES = {
    "a dtype in a header": ("model-00001-of-00002.safetensors", b'"F32"', b'"I32"'),
    "a shape in a header": ("model-00002-of-00002.safetensors", b'"shape":[4,6]', b'"shape":[6,4]'),
    "a name in a header": ("model-00001-of-00002.safetensors", b'"first"', b'"fIrst"'),
    "a value in the config": ("config.json", b'"llama"', b'"lLama"'),
    "a file in the index": ("model.safetensors.index.json", b"model-00002-of", b"model-00001-of"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_was_changed_in_place_is_found_before_publication(
    change: tuple[str, bytes, bytes], tmp_path: Path
) -> None:
    name, old, new = change
    model = save_model(tmp_path / "model", {"first": numbers(8, 4)}, {"second": numbers(4, 6)}, vocab_size=8)
    # Renamed, so that config and index are made anew and no file is the source's.
    checkpoint = open_model(model).rename({"first": "first", "second": "second.weight"})
    checkpoint = checkpoint.replace(config={**checkpoint.config, "vocab_size": 9})

    class Changing(Quiet):
        def checking(self, what: str) -> None:
            path = tmp_path / "out.partial" / name
            content = path.read_bytes()
            assert content.count(old) == 1
            path.write_bytes(content.replace(old, new))

    with pytest.raises(VerificationFailed) as caught:
        written(plan_of(checkpoint), tmp_path / "out", reporter=Changing())
    assert caught.value.code == "written-differs"
    assert caught.value.exit_code == 4
    assert sorted(os.listdir(tmp_path)) == ["model", "out.partial"]
