"""Files of two of Megatron's saves in one folder, and ranks' files in folders of other ranks: refused by each verb."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from converter.errors import ConvertError
from converter.sources.megatron.source import SOURCE
from mcore.compare import RUNS, oracle, shards
from megatron_ranks import edit_rank
from oracle.command import run
from zero.compare import evaluated

OLD, QWEN2, NEWER = RUNS / "old-qwen2-tp2-pp2", RUNS / "qwen2-tied-tp2-pp2", RUNS / "qwen3_moe-tp2-ep2-core-0.19"


def _copied(tmp_path: Path, name: Path = OLD) -> Path:
    return Path(shutil.copytree(name, tmp_path / "run"))


def _exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def _refused(folder: Path, words: str) -> None:
    with pytest.raises(ConvertError) as caught:
        SOURCE.open(folder, asked="x")
    assert (caught.value.code, words in caught.value.what) == ("megatron-mixed", True), caught.value
    assert [f.code for f in SOURCE.survey(folder).faults] == ["megatron-mixed"]


def _of_iteration(folder: Path, number: int, *ranks: str) -> None:
    """Files of a later save of the same run."""
    for rank in ranks:
        edit_rank(folder, rank, lambda state: state.update(iteration=number))


@pytest.mark.parametrize("ranks", [("01_000",), ("00_001", "01_001")], ids=["a-rank", "a-stage"])
def test_ranks_of_another_iteration_are_named(tmp_path: Path, ranks: tuple[str, ...]) -> None:
    folder = shards(_copied(tmp_path))
    _of_iteration(folder, 20, *ranks)
    _refused(folder, f"mp_rank_{ranks[0]} is of iteration 20, and mp_rank_00_000 of 10")


def test_no_verb_is_content_with_ranks_of_two_iterations(tmp_path: Path) -> None:
    folder, out = _copied(tmp_path), tmp_path / "out"
    _of_iteration(shards(folder), 20, "01_000")
    for code, given in (
        (3, ("gather", folder, out)),
        (3, ("convert", folder, out, "--to", "trl", "--role", "actor")),
        (1, ("doctor", folder)),
        (4, ("verify", folder)),
    ):
        done = run(*given)
        assert (done.code, "mp_rank_01_000 is of iteration 20" in done.out + done.err) == (code, True), given[0]
    assert not out.exists()


@pytest.mark.parametrize("which", ["old", "common.pt", "core 0.19"])
def test_a_folder_whose_name_has_another_iteration_than_its_files_is_refused(tmp_path: Path, which: str) -> None:
    run_folder = _copied(tmp_path, {"old": OLD, "common.pt": QWEN2, "core 0.19": NEWER}[which])
    folder = shards(run_folder).rename(run_folder / "iter_0000020")
    _refused(folder, "is of iteration 10, and the folder's name says 20")


@pytest.mark.parametrize("name", ["release", "iter_0000000", "mine"])
def test_names_that_say_no_iteration_are_no_reason_to_refuse(tmp_path: Path, name: str) -> None:
    folder = shards(_copied(tmp_path)).rename(tmp_path / "run" / name)
    assert set(evaluated(SOURCE.open(folder, asked="x").tensors)) > {"embedding.word_embeddings.weight"}


def test_what_converters_write_has_iteration_0_under_any_name(tmp_path: Path) -> None:
    folder = shards(_copied(tmp_path))
    _of_iteration(folder, 0, "00_000", "00_001", "01_000", "01_001")
    assert set(evaluated(SOURCE.open(folder, asked="x").tensors)) > {"embedding.word_embeddings.weight"}


def test_stages_whose_files_were_exchanged_are_told_by_the_embedding(tmp_path: Path) -> None:
    """Each stage numbers its layers from 0: the model would be whole, with its layers in another order."""
    folder = shards(_copied(tmp_path))
    for rank in ("00", "01"):
        _exchange(folder / f"mp_rank_{rank}_000", folder / f"mp_rank_{rank}_001")
    _refused(folder, "mp_rank_00_000 is of stage 0 of 2 by its name, and without the embedding")


def test_tp_ranks_that_were_exchanged_on_every_stage_are_not_told_without_their_numbers(tmp_path: Path) -> None:
    """Megatron's own script records the process in each file; where none is, nothing contradicts the exchange."""
    folder = shards(_copied(tmp_path))
    for stage in ("000", "001"):
        _exchange(folder / f"mp_rank_00_{stage}", folder / f"mp_rank_01_{stage}")
    made = evaluated(SOURCE.open(folder, asked="x").tensors)["embedding.word_embeddings.weight"]
    live = oracle(OLD)["model.embed_tokens.weight"]
    assert torch.equal(made[56:], live[:56])
