"""Files written in the workers of an executor: the bytes of one run, and errors that come whole out of a worker."""

from __future__ import annotations

import dataclasses
import os
import pickle  # noqa: TID251
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from converter.core.writer.tasks import write_with
from converter.diagnostic import Again
from converter.errors import Refused
from durability import Quiet, fast_folder, tree
from small_models import half_cast, written


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as made:
        yield made


def test_threads_make_what_one_process_makes_and_leave_torch_as_it_was(folder: Path) -> None:
    plan, before = half_cast(folder), torch.get_num_threads()
    with ThreadPoolExecutor(3) as pool:
        receipt = write_with(pool, plan, folder / "out", reporter=Quiet())
    assert torch.get_num_threads() == before
    assert receipt.content == written(plan, folder / "other").content
    assert tree(folder / "out") == tree(folder / "other")
    assert sorted(os.listdir(folder)) == ["model", "other", "out"]


@pytest.mark.slow
def test_new_processes_make_what_one_process_makes(folder: Path) -> None:
    plan = half_cast(folder)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        write_with(pool, plan, folder / "out", reporter=Quiet())
    written(plan, folder / "other")
    assert tree(folder / "out") == tree(folder / "other")
    assert sorted(os.listdir(folder)) == ["model", "other", "out"]


def test_what_a_worker_refuses_is_refused_and_the_next_run_goes_on_with_what_the_others_wrote(folder: Path) -> None:
    plan = half_cast(folder)
    file = folder / "model" / "model-00002-of-00003.safetensors"
    whole = file.stat()
    os.utime(file, ns=(whole.st_atime_ns, whole.st_mtime_ns + 1_000_000_000))
    with ThreadPoolExecutor(1) as pool, pytest.raises(Refused, match="changed") as caught:
        write_with(pool, plan, folder / "out", reporter=Quiet())
    assert caught.value.code == "input-changed"
    assert not (folder / "out").exists()
    os.utime(file, ns=(whole.st_atime_ns, whole.st_mtime_ns))
    with ThreadPoolExecutor(1) as pool:
        write_with(pool, plan, folder / "out", reporter=Quiet())
    written(plan, folder / "other")
    assert tree(folder / "out") == tree(folder / "other")
    assert sorted(os.listdir(folder)) == ["model", "other", "out"]


def test_an_output_that_is_there_is_refused_before_a_worker_begins(folder: Path) -> None:
    plan = half_cast(folder)
    written(plan, folder / "out")
    with ThreadPoolExecutor(1) as pool, pytest.raises(Refused, match="exists already"):
        write_with(pool, dataclasses.replace(plan, provenance={}), folder / "out", reporter=Quiet())
    assert sorted(os.listdir(folder)) == ["model", "out"]


def test_a_refusal_is_the_same_in_another_process() -> None:
    error = Refused("no-space", "the disk is full", where="out", got="1 GB", next=Again(("--memory", "1GB")))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is Refused
    assert (again.code, str(again), again.diagnostic) == (error.code, str(error), error.diagnostic)
