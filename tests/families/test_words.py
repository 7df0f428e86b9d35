"""Lists of names, each against the models of every family: what transformers calls them is what the lists know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from all_families import DECODERS, FAMILIES, input_of, output_of, small
from converter.cli import main
from converter.converters.fix.vocabulary import vocabulary_tensors
from converter.converters.merge.embeddings import is_vocabulary
from converter.examine.doctor import DoctorRequest, examine
from converter.families import words
from converter.families.implied import lacks
from converter.families.plain_names import plain_names
from converter.families.ties import is_output, stored_pair
from converter.sources.hf.source import SOURCE
from oracle.bases import quiet, read_tensors, save_tokenizer, write_tensors

EVERY = pytest.mark.parametrize(("task", "kind"), FAMILIES, ids=[kind for _, kind in FAMILIES])


@pytest.fixture
def untied(task: str, kind: str, tmp_path: Path) -> tuple[Any, Path]:
    """A model with two embeddings, and where transformers saved it. T5 has its head only where it is stored by hand."""
    model = small(task, kind, tied=False)
    with quiet():
        model.save_pretrained(tmp_path / "m")
    if kind == "t5":
        tensors = read_tensors(tmp_path / "m")
        write_tensors(tmp_path / "m", {**tensors, output_of(kind): tensors[input_of(kind)] + 1})
    return model, tmp_path / "m"


@EVERY
def test_the_input_embedding_is_the_one_that_the_model_looks_words_up_in(
    task: str, kind: str, untied: tuple[Any, Path]
) -> None:
    model, folder = untied
    tensors = read_tensors(folder)
    name = words.input_embedding(tensors)
    assert name == input_of(kind)
    assert torch.equal(tensors[name], model.get_input_embeddings().weight)


@EVERY
def test_the_stored_pair_is_the_models_own(task: str, kind: str, untied: tuple[Any, Path]) -> None:
    tensors = read_tensors(untied[1])
    config = json.loads((untied[1] / "config.json").read_text())
    assert stored_pair(list(tensors), config) == (input_of(kind), output_of(kind))
    assert [n for n in tensors if n.endswith(words.OUTPUTS)] == [output_of(kind)] * (kind != "bert")
    assert is_output(output_of(kind)) and not is_output(input_of(kind))


@EVERY
def test_patterns_of_embeddings_match_both_and_no_layer(task: str, kind: str, untied: tuple[Any, Path]) -> None:
    names = list(read_tensors(untied[1]))
    assert [n for n in names if words.INPUT.search(n)] == [input_of(kind)]
    assert [n for n in names if words.OUTPUT.search(n)] == [output_of(kind)] * (kind != "bert")


@EVERY
def test_both_embeddings_have_a_row_for_each_token(task: str, kind: str, untied: tuple[Any, Path]) -> None:
    found = vocabulary_tensors(SOURCE.open(untied[1], asked="m"))
    assert {input_of(kind), output_of(kind)} <= set(found)
    assert {t.info.shape[0] for t in found.values()} == {99}
    assert is_vocabulary(input_of(kind))
    assert is_vocabulary(output_of(kind)) is (kind != "bert")


@EVERY
@pytest.mark.parametrize("wrapper", [*(f"{w}." for w in words.OUTER_WRAPPERS), "_orig_mod.", "module._orig_mod."])
def test_wrappers_around_the_model_are_taken_off(task: str, kind: str, wrapper: str, untied: tuple[Any, Path]) -> None:
    names = list(read_tensors(untied[1]))
    config = json.loads((untied[1] / "config.json").read_text())
    assert [words.without_wrappers(wrapper + n) for n in names] == names
    assert [*plain_names([wrapper + n for n in names], config).names.values()] == names


@EVERY
@pytest.mark.parametrize("wrapper", words.INNER_WRAPPERS)
def test_wrappers_inside_the_model_are_taken_out(task: str, kind: str, wrapper: str, untied: tuple[Any, Path]) -> None:
    """As FSDP and activation checkpointing wrap each layer."""
    names = list(read_tensors(untied[1]))
    config = json.loads((untied[1] / "config.json").read_text())
    wrapped = [".".join(f"{p}.{wrapper}" if p.isdigit() else p for p in n.split(".")) for n in names]
    assert [words.without_wrappers(n) for n in wrapped] == names
    assert [*plain_names(wrapped, config).names.values()] == names


@EVERY
def test_no_name_of_a_model_is_taken_for_a_wrapper_or_for_lora(task: str, kind: str, untied: tuple[Any, Path]) -> None:
    names = list(read_tensors(untied[1]))
    assert [words.without_wrappers(n) for n in names] == names
    assert not any(set(n.split(".")) & {*words.IN_PEFT, *words.LORA_FACTORS} for n in names)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_lost_output_embedding_is_found(kind: str, tmp_path: Path) -> None:
    with quiet():
        small("causal", kind, tied=False).save_pretrained(tmp_path / "m")
    tensors = read_tensors(tmp_path / "m")
    write_tensors(tmp_path / "m", {n: t for n, t in tensors.items() if n != output_of(kind)})
    found = examine(DoctorRequest(str(tmp_path / "m"))).findings
    assert "output-embedding-missing" in {f.code for f in found}
    config = json.loads((tmp_path / "m/config.json").read_text())
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    assert lacks(shapes, config) == []
    assert lacks({n: s for n, s in shapes.items() if n != output_of(kind)}, config)
    assert lacks({n: s for n, s in shapes.items() if n != input_of(kind)}, config)


@EVERY
def test_a_critic_of_another_vocabulary_than_its_actor_is_found(task: str, kind: str, tmp_path: Path) -> None:
    with quiet():
        small(task, kind).save_pretrained(tmp_path / "critic")
        small(task, kind, vocab_size=107).save_pretrained(tmp_path / "actor")
    for actor, differs in (("critic", False), ("actor", True)):
        found = examine(DoctorRequest(str(tmp_path / "critic"), actor=str(tmp_path / actor))).findings
        assert ("pair-vocabulary" in {f.code for f in found}) is differs


@pytest.mark.parametrize("kind", DECODERS)
def test_a_padded_vocabulary_is_cut_in_both_embeddings(kind: str, tmp_path: Path) -> None:
    with quiet():
        small("causal", kind, tied=False, vocab_size=160).save_pretrained(tmp_path / "m")
        save_tokenizer(tmp_path / "m")  # of 154 words
    command = ["repair", str(tmp_path / "m"), str(tmp_path / "out"), "--vocab", "154", "-q"]
    assert main([*command, "--allow", "vocabulary-trim"]) == 0
    before, after = read_tensors(tmp_path / "m"), read_tensors(tmp_path / "out")
    for name in (input_of(kind), output_of(kind)):
        assert torch.equal(after[name], before[name][:154])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 154
