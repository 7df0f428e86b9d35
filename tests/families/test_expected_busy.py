"""Whether a class is known does not depend on a busy machine: the child counts its own time, not the clock's."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.converters.heads.plain import plain_head
from converter.core.checkpoint import Checkpoint
from converter.families import expected, expected_child
from healthy.models import Saved

CONFIG = {"model_type": "bert", "hidden_size": 16}


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that has a second of the processor, which the import of transformers takes."""
    program = tmp_path / "on_meta.py"
    text = expected_child.PROGRAM.read_text()
    assert "_MOST_SECONDS = 120" in text
    program.write_text(text.replace("_MOST_SECONDS = 120", "_MOST_SECONDS = 1"))
    monkeypatch.setattr(expected_child, "PROGRAM", program)
    monkeypatch.setattr(expected_child, "_CHILD", expected_child._Child())
    monkeypatch.setattr(expected_child, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected._expected.cache_clear()


def test_a_child_that_used_up_its_own_time_is_ended_and_its_answer_not_kept(slow: None, tmp_path: Path) -> None:
    found = expected_child.described("BertForSequenceClassification", CONFIG)
    assert found == {"unknown": "transformers did not build it in time or memory", "passing": True}
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["bert", "electra", "layoutlmv3"])
def test_the_head_of_a_class_that_did_not_answer_is_not_taken_for_a_users_own(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.converters.heads import plain
    from converter.sources.opening import input_spec, open_checkpoint

    folder = Saved("tokcls", kind).write(tmp_path / kind)
    checkpoint: Checkpoint = open_checkpoint(input_spec(str(folder)), token=None, keep_code=False)
    monkeypatch.setattr(plain, "expected", lambda config: expected.Unknown("no answer"))
    assert plain_head(checkpoint) is None
