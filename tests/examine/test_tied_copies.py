"""A tied pair that is stored twice is found in every family, and what loaders do with it is what they really do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from all_families import FAMILIES, input_of, output_of, save_twice, say
from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from oracle.bases import quiet
from selected import one_in

EVERY = pytest.mark.parametrize(("task", "kind"), FAMILIES, ids=[kind for _, kind in FAMILIES])


def copies(folder: Path) -> list[Any]:
    return [f for f in examine(DoctorRequest(str(folder), deep=True)).findings if f.code == "tied-copies"]


@EVERY
def test_copies_that_differ_change_numbers_and_both_are_named(task: str, kind: str, tmp_path: Path) -> None:
    save_twice(tmp_path / "m", task, kind, equal=False)
    (found,) = copies(tmp_path / "m")
    assert found.severity == "changes-numbers"
    assert found.tensors == (input_of(kind), output_of(kind))
    assert "transformers 5 keeps both" in found.text
    assert f"transformers 4 drops {output_of(kind)}" in found.text


@EVERY
def test_transformers_5_keeps_both_as_the_finding_says(task: str, kind: str, tmp_path: Path) -> None:
    """What transformers 4.57.6 does is measured in its own environment (tests/trainers)."""
    stored = save_twice(tmp_path / "m", task, kind, equal=False)
    with quiet():
        name = transformers.AutoConfig.from_pretrained(tmp_path / "m").architectures[0]
        model = getattr(transformers, name).from_pretrained(tmp_path / "m")
    assert torch.equal(model.get_input_embeddings().weight, stored[input_of(kind)])
    assert torch.equal(model.get_output_embeddings().weight, stored[output_of(kind)])


@EVERY
def test_equal_copies_only_take_room(task: str, kind: str, tmp_path: Path) -> None:
    save_twice(tmp_path / "m", task, kind, equal=True)
    assert [f.severity for f in copies(tmp_path / "m")] == ["cosmetic"]


SILENT = [(t, k) for t, k in FAMILIES if k in ("gpt2", "bloom", "falcon", "opt", "mpt", "gemma", "bert", "t5")]


@pytest.mark.parametrize(("task", "kind"), FAMILIES, ids=[kind for _, kind in FAMILIES])
def test_a_silent_config_ties_where_its_class_does(task: str, kind: str, tmp_path: Path) -> None:
    save_twice(tmp_path / "m", task, kind, equal=False)
    say(tmp_path / "m", tie_word_embeddings=...)
    assert bool(copies(tmp_path / "m")) is ((task, kind) in SILENT)


@pytest.mark.parametrize(("task", "kind"), one_in(2, [pytest.param(*family, id=family[1]) for family in FAMILIES]))
def test_repair_stores_equal_copies_once_and_unties_those_that_differ(task: str, kind: str, tmp_path: Path) -> None:
    with quiet():
        save_twice(tmp_path / "equal", task, kind, equal=True)
        stored = save_twice(tmp_path / "m", task, kind, equal=False)
        assert main(["repair", str(tmp_path / "equal"), str(tmp_path / "once"), "-q"]) == 0
        assert copies(tmp_path / "once") == []
        assert main(["repair", str(tmp_path / "m"), str(tmp_path / "no"), "-q"]) == 3
        assert main(["repair", str(tmp_path / "m"), str(tmp_path / "untied"), "--allow", "untie", "-q"]) == 0
    assert copies(tmp_path / "untied") == []
    with quiet():
        name = transformers.AutoConfig.from_pretrained(tmp_path / "m").architectures[0]
        once = getattr(transformers, name).from_pretrained(tmp_path / "once")
        untied = getattr(transformers, name).from_pretrained(tmp_path / "untied")
    assert torch.equal(once.get_output_embeddings().weight, once.get_input_embeddings().weight)
    assert torch.equal(untied.get_output_embeddings().weight, stored[output_of(kind)])
