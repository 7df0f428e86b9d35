"""The shipped fixtures are what their provenance says: real, trained, small, unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import oracle
from converter.shipped import shipped
from oracle.bases import quiet
from oracle.command import merged

FIXTURES = shipped("fixtures")
BASE = FIXTURES / "tiny-qwen2-base"
ADAPTER = FIXTURES / "tiny-reward-adapter"
RUN = FIXTURES / "tiny-reward-run"
FOLDERS = sorted(p for p in FIXTURES.iterdir() if p.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_fixture_holds_exactly_the_files_of_its_provenance(folder: Path) -> None:
    record = json.loads((folder / "fixture.json").read_text())
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "fixture.json")
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert found == record["files"]
    assert record["seed"]
    assert record["versions"]["torch"]
    assert record["what"]
    assert Path(record["made_by"]).name == ("make_incident.py" if folder == RUN else "make_fixtures.py")
    assert (FIXTURES.parent / record["made_by"]).is_file()


def test_fixtures_are_small() -> None:
    assert FOLDERS == [BASE, ADAPTER, RUN]
    assert sum(p.stat().st_size for folder in FOLDERS for p in folder.rglob("*")) < 800_000


def test_fixtures_name_no_path_of_the_machine_that_made_them() -> None:
    for folder in FOLDERS:
        for file in (p for p in folder.rglob("*") if p.suffix in (".json", ".pt")):
            content = file.read_bytes()
            assert not [word for word in (b"/home", b"/root", b"/tmp", b"/work") if word in content], file
    assert oracle.read_config(ADAPTER, "adapter_config.json")["base_model_name_or_path"] == BASE.name


def _rewards(model: Any, pairs: list[dict[str, Any]]) -> list[tuple[float, float]]:
    import transformers

    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(ADAPTER)
    found = []
    for pair in pairs:
        row = []
        for side in ("chosen", "rejected"):
            messages = [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair[side]},
            ]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            row.append(float(oracle.logits(model, {"input_ids": ids})[0, 0]))
        found.append((row[0], row[1]))
    return found


def test_merged_fixture_is_the_reward_model_that_was_trained(tmp_path: Path) -> None:
    """Rewards of held-out pairs were recorded from the unmerged peft model when the fixture was made."""
    training = json.loads((ADAPTER / "fixture.json").read_text())["training"]
    assert training["held_out_accuracy"] > 0.9
    merged(ADAPTER, tmp_path / "rm", "--base", BASE, "--dtype", "float32")
    model = oracle.load_output(tmp_path / "rm", "AutoModelForSequenceClassification")
    pairs = training["held_out"]
    for pair, (chosen, rejected) in zip(pairs, _rewards(model, pairs), strict=True):
        assert chosen == pytest.approx(pair["chosen_reward"], abs=2e-3)
        assert rejected == pytest.approx(pair["rejected_reward"], abs=2e-3)
        assert chosen > rejected


def test_base_alone_does_not_know_the_preference(tmp_path: Path) -> None:
    """Otherwise a merge that does nothing would pass: with a fresh head the base tells no pair apart by a unit."""
    import torch
    import transformers

    torch.manual_seed(0)
    with quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            BASE, num_labels=1, pad_token_id=0, dtype=torch.float32
        ).eval()
    pairs = json.loads((ADAPTER / "fixture.json").read_text())["training"]["held_out"]
    assert all(abs(chosen - rejected) < 1 for chosen, rejected in _rewards(model, pairs))
