"""Settings that must hold before torch, transformers or peft are imported by any test."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Matrices here are tiny, and a team of threads for each costs more than all that is computed. Tests that are about
# threads ask torch for some.
os.environ["OMP_NUM_THREADS"] = "1"

# Where it may not keep what it made, pytest rewrites the assertions of all test files in each worker of each run: ten
# seconds of a processor each time. Its byte code lies beside the files, where git ignores it.
sys.dont_write_bytecode = False


def _use_memory() -> None:
    """Temporary folders lie in memory where there is room for them: an fsync to a disk takes longer than most tests."""
    memory = Path("/dev/shm")
    is_roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 6_000_000_000
    if is_roomy:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


_use_memory()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that is imported and collected is garbage: looking for some is a tenth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What was imported and collected lives to the end: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)  # a model is built of more than the usual 700 objects, and so is a plan


@pytest.fixture(scope="session", autouse=True)
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary files of tests, of their children and of libraries lie where pytest removes them.

    What the tool itself makes there has to be gone at the end.
    """
    before, folder = os.environ.get("TMPDIR"), tmp_path_factory.mktemp("t")
    base = tmp_path_factory.getbasetemp()
    # Beside what pytest makes for each worker, so that models are built once for all of them.
    os.environ["RLHF_CONVERT_TESTS_MADE_ONCE"] = str(
        (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    )
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    yield
    tempfile.tempdir = None
    del os.environ["TMPDIR"]
    if before is not None:
        os.environ["TMPDIR"] = before
    assert [p.name for p in folder.glob("rlhf-convert*")] == []


@pytest.fixture
def shop(tmp_path: Path) -> Any:
    """A sound base and a sound adapter to break: an `oracle.workshop.Workshop`."""
    from oracle.workshop import Workshop

    return Workshop(tmp_path)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What is logged during a test, ours from INFO on.

    pytest's own plug-in for it is off: around each phase of each test it hangs handlers on the thirty loggers of
    libraries that pass nothing on to the root.
    """
    kept, root, ours = _Kept(), logging.getLogger(), logging.getLogger("converter")
    before = ours.level
    root.addHandler(kept)
    ours.setLevel(logging.INFO)
    yield kept.records
    ours.setLevel(before)
    root.removeHandler(kept)


@pytest.fixture(autouse=True, scope="session")
def _errors_lead_on() -> Iterator[None]:
    """Every error that a command line ends with, in any test, ends with a command that can be typed."""
    import converter.cli as cli
    from walk_along import Along, watched

    report = os.environ.get("WALK")
    before = cli._complete
    cli._complete = watched(before, Along(Path(report)) if report else None)
    yield
    cli._complete = before


@pytest.fixture(autouse=True)
def _interruptible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Python's own handler of SIGINT in tests marked `signals`, which children get as the default action.

    Where a run is started with SIGINT ignored (`nohup`, a job in the background, some CI), Python leaves it ignored.
    """
    if request.node.get_closest_marker("signals") is None:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
