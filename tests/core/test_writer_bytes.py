"""The bytes that are written: copied whatever the system can do, computed in chunks, the same for any `--jobs`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.core.checkpoint import Checkpoint
from converter.core.tensors import kernel_specs
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.core.writer.plan import Plan
from converter.core.writer.shard_plan import Entry
from converter.errors import Refused, VerificationFailed
from durability import Quiet, tree
from small_models import load, numbers, open_model, plan_of, same, save_model, written

TALL = (200, 8192)
"""64 rows of this are a chunk, and 8 rows are left over."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Weights tall enough for several chunks, factors for them, and what is only copied."""
    return save_model(
        tmp_path / "model",
        {"w": eighths(*TALL).bfloat16(), "copied": numbers(700, 50), "norm": numbers(7, seed=3)},
        {"a": eighths(4, 8192, seed=1), "b": eighths(200, 4, seed=2), "half": numbers(*TALL, seed=4)},
    )


def eighths(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values whose products and sums are exact in fp32, so that there is one right answer after rounding."""
    return (numbers(*shape, seed=seed) * 8).round() / 8


def merged(checkpoint: Checkpoint, scale: float = 0.5) -> LazyTensor:
    """`w + scale * b @ a`, in bf16."""
    params: dict[str, kernel_specs.Param] = {
        "scales": (scale,), "dora": (False,), "numerics": "best", "out": "BF16", "transposed": False,
    }  # fmt: skip
    w, a, b = (checkpoint.tensors[n] for n in "wab")
    return tensors.apply(kernel_specs.LORA_MERGE, [w, a, b], params)


def changed(model: Path, **more: LazyTensor) -> Plan:
    """A plan of what is copied, merged and cast."""
    checkpoint = open_model(model)
    computed = {"w": merged(checkpoint), "half": tensors.cast(checkpoint.tensors["half"], DType.F16)}
    return plan_of(checkpoint.replace(tensors={**checkpoint.tensors, **computed, **more}))


def reference(model: Path) -> dict[str, torch.Tensor]:
    """The same by torch on whole tensors, the sum in fp64."""
    given = load(model)
    exact = given["w"].double() + 0.5 * (given["b"].double() @ given["a"].double())
    return given | {"w": exact.to(torch.bfloat16), "half": given["half"].half()}


def entry(plan: Plan, name: str) -> Entry:
    return next(e for e in plan.entries if e.name == name)


# Computed


def test_computed_tensors_are_what_torch_computes_of_whole_ones(model: Path, tmp_path: Path) -> None:
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))


def test_chunks_are_64_rows_or_more_and_the_rest_joins_the_last(model: Path) -> None:
    assert entry(changed(model), "w").chunks() == [(0, 64), (64, 128), (128, 200)]


@pytest.mark.parametrize(
    ("rows", "chunks"),
    [
        (1, [(0, 1)]), (63, [(0, 63)]), (64, [(0, 64)]), (65, [(0, 65)]), (127, [(0, 127)]),
        (128, [(0, 64), (64, 128)]), (193, [(0, 64), (64, 128), (128, 193)]),
    ],
)  # fmt: skip
def test_chunk_boundaries(rows: int, chunks: list[tuple[int, int]]) -> None:
    stored = tensors.stored(TensorInfo(DType.F32, (rows, 4096)), "/x", 0)
    assert Entry("x", tensors.cast(stored, DType.BF16), 0, 64).chunks() == chunks


@pytest.mark.parametrize("jobs", [2, 5])
@pytest.mark.parametrize("memory", [None, 315_000_000])
def test_the_same_bytes_for_any_number_of_jobs_and_any_memory(
    model: Path, tmp_path: Path, jobs: int, memory: int | None
) -> None:
    written(changed(model), tmp_path / "one")
    for attempt in range(3):
        written(changed(model), tmp_path / str(attempt), jobs=jobs, memory=memory)
        assert tree(tmp_path / str(attempt)) == tree(tmp_path / "one")


def test_the_bytes_do_not_depend_on_how_many_threads_torch_has(model: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            written(changed(model), tmp_path / str(threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert tree(tmp_path / "1") == tree(tmp_path / "4")


@pytest.mark.parametrize("flush", [1, 100_000, 700_000])
def test_files_that_are_flushed_while_they_are_written_are_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush: int
) -> None:
    monkeypatch.setattr("converter.core.writer.shard_writer.FLUSH_BYTES", flush)
    for attempt in range(3):
        reporter = Quiet()
        written(changed(model), tmp_path / str(attempt), jobs=3, reporter=reporter)
        assert same(load(tmp_path / str(attempt)), reference(model))
        assert len(reporter.written) == 2


def test_filled_and_empty_and_0_d_tensors_are_written(model: Path, tmp_path: Path) -> None:
    checkpoint = open_model(model)
    more = {
        "ones": tensors.Filled(TensorInfo(DType.F16, (3, 5)), 1),
        "scalar": tensors.cast(tensors.reshape(tensors.rows(checkpoint.tensors["norm"], 2, 3), ()), DType.F64),
        "empty": tensors.Filled(TensorInfo(DType.F32, (0, 3)), 0),
    }
    written(changed(model, **more), tmp_path / "out")
    expected = {
        "ones": torch.ones(3, 5, dtype=torch.float16),
        "scalar": load(model)["norm"][2].double(),
        "empty": torch.zeros(0, 3),
    }
    assert same(load(tmp_path / "out"), reference(model) | expected)


def test_too_little_memory_is_refused_with_the_tensor_and_the_option(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        written(changed(model), tmp_path / "out", memory=200_000_000)
    assert caught.value.code == "no-memory"
    assert " w " in caught.value.what or " half " in caught.value.what
    assert str(caught.value.next).startswith("the same command with --memory 3")
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_just_enough_memory_for_one_chunk_is_enough_for_many_jobs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        written(changed(model), tmp_path / "out", memory=1)
    least = int(str(caught.value.next).removeprefix("the same command with --memory ").removesuffix("MB")) * 1_000_000
    written(changed(model), tmp_path / "out", memory=least, jobs=4)
    assert same(load(tmp_path / "out"), reference(model))


# Copied


def refusing(number: int) -> Callable[..., int]:
    def call(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY])
def test_where_the_system_can_not_share_blocks_the_bytes_are_read_and_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", refusing(number))
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))


def test_a_failing_disk_is_not_taken_for_one_that_shares_no_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_model(save_model(tmp_path / "model", {"large": numbers(100, 1000)}))
    monkeypatch.setattr(fcntl, "ioctl", refusing(errno.EIO))
    with pytest.raises(Refused, match="Input/output error"):
        written(plan_of(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_there_is_no_such_call_the_space_is_not_reserved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))


def test_a_file_system_that_can_not_reserve_space_is_written_all_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refusing(errno.EOPNOTSUPP))
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))


def test_short_counts_are_normal(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:3001], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, [buffers[0][:7001]], at))
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))


def test_a_column_range_is_copied_in_many_runs(tmp_path: Path) -> None:
    wide = numbers(6, 100_000)
    checkpoint = open_model(save_model(tmp_path / "model", {"wide": wide}))
    part = tensors.narrow(checkpoint.tensors["wide"], 1, 17, 60_001)
    plan = plan_of(checkpoint.replace(tensors={"part": part}))
    assert plan.counts["copied"] == 1
    written(plan, tmp_path / "out")
    assert same(load(tmp_path / "out"), {"part": wide[:, 17:60_018]})


# Values that are not finite


def test_an_overflow_in_a_cast_stops_the_run_names_the_tensor_and_keeps_the_stage(tmp_path: Path) -> None:
    values = numbers(100, 4)
    values[3, 1] = values[99, 2] = 1e6
    checkpoint = open_model(save_model(tmp_path / "model", {"w": values, "x": numbers(5)}))
    cast = {n: tensors.cast(t, DType.F16) for n, t in checkpoint.tensors.items()}
    with pytest.raises(VerificationFailed) as caught:
        written(plan_of(checkpoint.replace(tensors=cast)), tmp_path / "out")
    assert caught.value.code == "new-nonfinite"
    assert "2 values overflowed in 1 tensors, 2 of them in w" in caught.value.what
    assert "out.partial is kept" in caught.value.what
    assert sorted(os.listdir(tmp_path)) == ["model", "out.partial"]
    wider = plan_of(checkpoint.replace(tensors={n: tensors.cast(t, DType.BF16) for n, t in checkpoint.tensors.items()}))
    written(wider, tmp_path / "out", resume=False)
    assert load(tmp_path / "out")["w"][3, 1] == torch.tensor(1e6).bfloat16()


def test_values_that_were_not_finite_before_are_kept_and_the_receipt_is_strict_json(
    model: Path, tmp_path: Path
) -> None:
    given = load(model)
    given["w"][5, 5], given["w"][6, 6] = float("inf"), float("nan")
    model = save_model(tmp_path / "other", given)
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))

    def no_constant(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "out" / "rlhf-convert.json").read_text()
    receipt = json.loads(text, parse_constant=no_constant)
    assert receipt["tensors"]["w"]["nonfinite_kept"] == 2
    assert receipt["tensors"]["w"]["base"] is None


# Failures


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_and_no_thread_is_left_behind(model: Path, tmp_path: Path) -> None:
    class Failing(Quiet):
        def advance(self, count: int, tensor: str) -> None:
            if tensor == "half":
                raise RuntimeError("the reporter broke")

    written(changed(model), tmp_path / "warm", jobs=3)
    files, threads = open_files(), threading.active_count()
    written(changed(model), tmp_path / "out", jobs=3)
    with pytest.raises(RuntimeError, match="the reporter broke"):
        written(changed(model), tmp_path / "failed", jobs=3, reporter=Failing())
    with pytest.raises(Refused):
        written(changed(model), tmp_path / "out", jobs=3)
    assert (open_files(), threading.active_count()) == (files, threads)


@pytest.mark.parametrize("where", ["start", "advance", "shard_done", "checking"])
def test_an_exception_in_the_reporter_reaches_the_caller_and_nothing_is_published(
    model: Path, tmp_path: Path, where: str
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError(f"{where} broke")

    reporter = Quiet()
    setattr(reporter, where, broken)
    with pytest.raises(RuntimeError, match=f"{where} broke"):
        written(changed(model), tmp_path / "out", jobs=2, reporter=reporter)
    assert not (tmp_path / "out").exists()
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))


@pytest.mark.signals
@pytest.mark.parametrize("where", ["start", "advance", "shard_done", "checking"])
def test_a_signal_reaches_the_caller_once_no_thread_writes_any_more(model: Path, tmp_path: Path, where: str) -> None:
    real = getattr(Quiet, where)

    class Interrupting(Quiet):
        def send(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            real(self, *args)

    reporter = Interrupting()
    setattr(reporter, where, reporter.send)
    with pytest.raises(KeyboardInterrupt):
        written(changed(model), tmp_path / "out", jobs=3, reporter=reporter)
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("worker", "finisher"))]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "out").exists()
    written(changed(model), tmp_path / "out")
    assert same(load(tmp_path / "out"), reference(model))


@pytest.mark.signals
def test_a_handler_that_does_not_stop_the_run_is_called_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    called: list[int] = []

    class Interrupting(Quiet):
        def advance(self, count: int, tensor: str) -> None:
            if tensor == "half" and not called:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        written(changed(model), tmp_path / "out", reporter=Interrupting())
        assert called
    finally:
        signal.signal(signal.SIGTERM, before)
    assert same(load(tmp_path / "out"), reference(model))


def test_progress_adds_up_to_the_bytes_of_all_tensors(model: Path, tmp_path: Path) -> None:
    reporter = Quiet()
    written(changed(model), tmp_path / "out", jobs=2, reporter=reporter)
    assert reporter.bytes == sum(t.nbytes for t in reference(model).values())
    assert sorted(reporter.written) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


# The check after writing


@pytest.mark.parametrize("tensor", ["w", "half", "copied"])
def test_bytes_that_went_wrong_on_the_disk_are_found_before_publication(
    model: Path, tmp_path: Path, tensor: str
) -> None:
    plan = changed(model)
    shard = next(s for s in plan.shards if any(e.name == tensor for e in s.entries))
    found = entry(plan, tensor)

    class Rotting(Quiet):
        def checking(self, what: str) -> None:
            with (tmp_path / "out.partial" / shard.file).open("r+b") as file:
                file.seek(found.offset)
                rotten = bytes(b ^ 0x40 for b in file.read(found.length))
                file.seek(found.offset)
                file.write(rotten)

    with pytest.raises(VerificationFailed, match=f"{tensor} on disk differs") as caught:
        written(plan, tmp_path / "out", reporter=Rotting())
    assert caught.value.exit_code == 4
    assert sorted(os.listdir(tmp_path)) == ["model", "out.partial"]
    written(plan, tmp_path / "out", resume=False)
    assert same(load(tmp_path / "out"), reference(model))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "model-00002-of-00002.safetensors"])
def test_a_file_that_was_cut_on_the_disk_is_found_before_publication(model: Path, tmp_path: Path, name: str) -> None:
    class Cutting(Quiet):
        def checking(self, what: str) -> None:
            path = tmp_path / "out.partial" / name
            os.truncate(path, path.stat().st_size - 1)

    with pytest.raises((VerificationFailed, Refused)):
        written(changed(model), tmp_path / "out", reporter=Cutting())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_another_put_into_the_stage_is_not_published(model: Path, tmp_path: Path, verify: bool) -> None:
    class Guest(Quiet):
        def shard_done(self, file: str, size: int, resumed: bool) -> None:
            (tmp_path / "out.partial" / "guest.py").write_text("")

    with pytest.raises(VerificationFailed, match=r"guest\.py"):
        written(changed(model), tmp_path / "out", reporter=Guest(), verify=verify)
    assert not (tmp_path / "out").exists()
