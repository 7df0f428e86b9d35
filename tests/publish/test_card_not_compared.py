"""A card repeats what was compared with nothing: by the receipt, and by what doctor says of the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import converter
from converter.publish.card import CardFacts, model_card
from converter.shipped import shipped
from doctored import edit

UNKNOWN = "names and shapes not checked: family unknown (class Qwen9ForCausalLM)"
ALONE = "the adapter is not compared with a base: none is at hand"


@pytest.mark.parametrize(
    ("note", "line"),
    [
        (["info", "family-unknown", UNKNOWN], f"Not checked: {UNKNOWN}."),
        (["info", "adapter-not-compared", ALONE], f"Not checked: {ALONE}."),
        (["info", "family-unknown", ["a", "list"]], "Not checked: "),
    ],
)
def test_what_the_gate_could_not_compare_is_in_the_card(note: list[object], line: str) -> None:
    card = model_card(CardFacts("org/m", {"version": "0", "notes": [note]}, {}, False, 1))
    assert line in card
    assert "Not checked" not in model_card(CardFacts("org/m", {"version": "0"}, {}, False, 1))


def test_an_adapter_is_pushed_with_the_word_that_its_base_was_not_there(tmp_path: Path) -> None:
    adapter = shutil.copytree(shipped("fixtures") / "tiny-reward-adapter", tmp_path / "adapter")
    edit(adapter, "adapter_config.json", base_model_name_or_path="somebody/elsewhere")
    assert "Not checked: not compared with a base." in card_of(adapter)
    edit(adapter, "adapter_config.json", base_model_name_or_path=str(shipped("fixtures") / "tiny-qwen2-base"))
    assert "Not checked" not in card_of(adapter)


def card_of(folder: Path) -> str:
    pushed = converter.push(folder, "org/m", dry_run=True)
    (card,) = [f for f in pushed.files if f.name == "README.md"]
    assert card.content is not None
    return card.content.decode()
