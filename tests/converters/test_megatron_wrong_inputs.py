"""What does not belong to a Megatron run's model is named by gather and doctor alike: configs, ranks' files, steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore.compare import RUNS, oracle, shards, written
from megatron_ranks import edit_rank
from oracle.command import run
from zero.compare import differences

MIXTURE, QWEN2 = RUNS / "qwen3_moe-tp2-ep2-core-0.19", RUNS / "qwen2-tied-tp2-pp2"
LLAMA, OLD = RUNS / "llama-layers-pp2", RUNS / "old-qwen2-tp2-pp2"
RANKS = ("00_000", "01_000", "00_001", "01_001")


def _copied(tmp_path: Path, source: Path, **config: Any) -> Path:
    """A run with some fields of its config.json changed, and without the oracle's weights beside it."""
    folder = Path(shutil.copytree(source, tmp_path / "run"))
    (folder / "hf" / "model.safetensors").unlink()
    path = folder / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def _refused(folder: Path, code: str, words: str) -> None:
    """gather writes nothing and doctor finds an error, in the same words."""
    out = folder.parent / "out"
    done = run("gather", folder, out)
    assert done.code in (2, 3), done.text
    assert code in done.text
    assert words in done.text
    assert not out.exists()
    told = run("doctor", folder)
    assert told.code == 1, told.text
    assert words in told.text


def _arguments(folder: Path, **values: Callable[[str], object]) -> None:
    """Set what every rank's file says that the training script was called with."""
    for rank in RANKS:
        edit_rank(shards(folder), rank, lambda s, r=rank: vars(s["args"]).update({k: v(r) for k, v in values.items()}))


def _process(rank: str) -> int:
    """The number of the process that has a rank, of four with TP 2 and PP 2: TP counts first."""
    return int(rank[:2]) + 2 * int(rank[3:])


# Another model's config


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        (MIXTURE, {"num_local_experts": 8}, "num_experts is 4, and config.json 8"),
        (MIXTURE, {"moe_intermediate_size": 24}, "moe_ffn_hidden_size is 12, and config.json 24"),
        (QWEN2, {"tie_word_embeddings": False}, "there is no output_layer.weight, as of tied embeddings"),
    ],
)
def test_a_config_of_another_model_is_named(tmp_path: Path, source: Path, changes: dict[str, Any], words: str) -> None:
    _refused(_copied(tmp_path, source, **changes), "megatron-config", words)


def test_a_class_with_more_tensors_than_the_run_has_is_named(tmp_path: Path) -> None:
    folder = _copied(tmp_path, LLAMA, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    _refused(folder, "tensors-missing", "6 of 27 tensors that Qwen2ForCausalLM asks for are missing")


def test_a_family_without_rows_is_refused_by_name(tmp_path: Path) -> None:
    folder = _copied(tmp_path, MIXTURE, model_type="olmoe", architectures=["OlmoeForCausalLM"])
    _refused(folder, "megatron-family", "is not known for the model type olmoe")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rotary_base": 1000000}, "rotary_base is 1000000, and config.json 10000.0"),
        ({"norm_epsilon": 1e-5}, "norm_epsilon is 1e-05, and config.json 1e-06"),
    ],
)
def test_positions_and_norms_of_other_numbers_need_consent(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    folder = _copied(tmp_path, OLD)
    _arguments(folder, **{k: lambda _, v=v: v for k, v in given.items()})
    _refused(folder, "megatron-config", words)
    out = tmp_path / "out"
    assert run("gather", folder, out, "--allow", "megatron-config").code == 0
    assert differences(written(out), oracle(OLD)) == []


@pytest.mark.parametrize(("tokens", "code"), [(99, 0), (90, 0), (100, 3)])
def test_a_run_with_more_tokens_than_the_config_has_rows_is_refused(tmp_path: Path, tokens: int, code: int) -> None:
    folder = _copied(tmp_path, OLD)
    _arguments(folder, vocab_size=lambda _: tokens)
    done = run("gather", folder, tmp_path / "out")
    assert done.code == code, done.err
    assert ("vocab_size is 100, and config.json 99" in done.err) is (code == 3)


# Files of ranks under the names of others


def test_ranks_whose_files_were_exchanged_are_told_by_the_tied_embedding(tmp_path: Path) -> None:
    folder = _copied(tmp_path, OLD)
    one, other = (shards(folder) / f"mp_rank_{r}" for r in ("00_001", "01_001"))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    _refused(folder, "megatron-copies", "output_layer.weight is in two stages, and the copies differ")


def test_ranks_whose_files_were_exchanged_are_told_by_the_process_that_wrote_them(tmp_path: Path) -> None:
    folder = _copied(tmp_path, OLD)
    _arguments(folder, world_size=lambda _: 4, rank=lambda r: _process(r) ^ 1)
    _refused(folder, "megatron-mixed", "mp_rank_00_000 was written by process 1 of 4, which is TP 1, PP 0")


@pytest.mark.parametrize("rank", [_process, lambda _: 0], ids=["their-own", "one-for-all-as-converters-write"])
def test_processes_that_fit_their_ranks_are_no_reason_to_refuse(tmp_path: Path, rank: Callable[[str], int]) -> None:
    folder, out = _copied(tmp_path, OLD), tmp_path / "out"
    _arguments(folder, world_size=lambda _: 4, rank=rank, rotary_base=lambda _: 10000, norm_epsilon=lambda _: 1e-6)
    assert run("gather", folder, out).code == 0
    assert differences(written(out), oracle(OLD)) == []


# Steps that are not whole


def _newer(folder: Path, *files: str) -> Path:
    """A save that began after the one that is whole, as far as megatron-core 0.19 got."""
    newer = folder / "iter_0000020"
    newer.mkdir()
    for name in files:
        shutil.copy(shards(MIXTURE) / name, newer)
    return newer


@pytest.mark.parametrize("files", [("__0_0.distcp",), ("__0_0.distcp", "__1_0.distcp", ".metadata")])
def test_a_newer_save_that_was_cut_off_is_named_where_the_tracker_means_it(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    folder = _copied(tmp_path, MIXTURE)
    newer = _newer(folder, *files)
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text("20")
    _refused(folder, "megatron-unfinished", "metadata.json is missing, which Megatron writes last")
    tracker.write_text("10")
    out = tmp_path / "out"
    assert run("gather", folder, out).code == 0
    assert differences(written(out), oracle(MIXTURE)) == []
    assert newer.is_dir()


def test_a_tracker_that_names_a_step_which_is_gone_is_not_passed_over(tmp_path: Path) -> None:
    folder = _copied(tmp_path, MIXTURE)
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    _refused(folder, "no-such-tag", "names 20, which is not here: it was deleted, or not copied")
    assert run("gather", folder, tmp_path / "out", "--tag", "iter_0000010").code == 0
