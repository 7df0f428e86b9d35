"""index.json: read strictly as a claim, written as transformers writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converter.core.formats.safetensors_io import build_index, read_index
from converter.errors import Refused

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index_of(weight_map: Any) -> bytes:
    return json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}).encode()


BAD_INDEXES = {
    "empty": (b"", "empty"),
    "cut": (index_of({"w": A})[:-3], "Unterminated string"),
    "list": (b"[]", "no weight_map"),
    "no-weight-map": (b'{"metadata": {}}', "no weight_map"),
    "weight-map-list": (index_of([A]), "no weight_map"),
    "weight-map-empty": (index_of({}), "no weight_map"),
    "weight-map-null": (index_of(None), "no weight_map"),
    "key-twice": (b'{"weight_map": {"w": "%s", "w": "%s"}}' % (A.encode(), B.encode()), "`w` appears twice"),
    "weight-map-twice": (b'{"weight_map": {}, "weight_map": {"w": "%s"}}' % A.encode(), "`weight_map` appears twice"),
    "number": (index_of({"w": 1}), "not a plain file name"),
    "climbs": (index_of({"w": "../model.safetensors"}), "not a plain file name"),
    "absolute": (index_of({"w": "/etc/model.safetensors"}), "not a plain file name"),
    "folder": (index_of({"w": "shards/model.safetensors"}), "not a plain file name"),
    "url": (index_of({"w": "https://example.org/model.safetensors"}), "not a plain file name"),
    "nul": (index_of({"w": "model\0.safetensors"}), "not a plain file name"),
    "newline": (index_of({"w": "model.safetensors\n"}), "not a plain file name"),
    "hidden": (index_of({"w": ".model.safetensors"}), "not a plain file name"),
    "only-suffix": (index_of({"w": ".safetensors"}), "not a plain file name"),
    "two-dots": (index_of({"w": "..safetensors"}), "not a plain file name"),
    "pickle": (index_of({"w": "pytorch_model.bin"}), "not a plain file name"),
    "backslash": (index_of({"w": "..\\model.safetensors"}), "not a plain file name"),
    "unicode": (index_of({"w": "módel.safetensors"}), "not a plain file name"),
    "deep": (b'{"weight_map": ' + b"[" * 100 + b"]" * 100 + b"}", "deeper"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_malformed_index_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    raw, words = BAD_INDEXES[name]
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(raw)
    with pytest.raises(Refused) as caught:
        read_index(path)
    assert caught.value.code == "index-malformed"
    assert path.name in str(caught.value)
    assert words in caught.value.what


def test_index_is_read_and_its_other_keys_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 8.5}, "weight_map": {"w": A}, "made_by": [1]}))
    index = read_index(path)
    assert (index.weight_map, index.metadata) == ({"w": A}, {"total_size": 8.5})


def test_index_is_the_one_that_transformers_writes() -> None:
    assert build_index({"b": B, "a": A}, 4096) == (
        b'{\n  "metadata": {\n    "total_size": 4096\n  },\n  "weight_map": {\n'
        b'    "a": "model-00001-of-00002.safetensors",\n    "b": "model-00002-of-00002.safetensors"\n  }\n}\n'
    )
