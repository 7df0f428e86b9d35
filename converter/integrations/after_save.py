"""Examine a checkpoint right after it was saved, in a child process, while the process that holds the numbers lives.

    from converter.integrations import examine_after_save
    save_model(folder)
    examine_after_save(folder, for_="openrlhf", strict=True)

Rank 0 examines; other ranks return at once. The training process reads no tensor and imports nothing heavy.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.diagnostic import Command, Next, as_argument, spelled
from converter.errors import ConvertError
from converter.examine.glance import Glance, glance_of
from converter.integrations.settings import what_to_set

LOGGER = logging.getLogger("converter.integrations")
"""Where the lines go: `info` for what is sound, `error` for what is broken, `warning` for the rest: what changes
numbers, and what could not be examined, or compared with what a load asks for.
"""

TIMEOUT = 600.0
"""Seconds after which a child is given up; ranks that wait for it are given up by NCCL after ten minutes."""


class BrokenCheckpoint(ConvertError):
    """What was saved is broken, or could not be examined; the weights are still in the memory of this process."""

    exit_code = 3

    def to_words(self) -> tuple[str, str, str | None, str | None]:
        """What another rank makes the same error of."""
        return self.code, self.what, self.where, spelled(self.next)

    @classmethod
    def of_words(cls, words: tuple[str, str, str | None, str | None]) -> BrokenCheckpoint:
        """The error that rank 0 has."""
        said, what, where, step = words
        return cls(said, what, where=where, next=step)


@dataclass
class Examination:
    """One examination, running or ended.

    Attributes:
        folder: what is examined.
        seconds: how long the child took.
        findings: as `doctor --json` prints them, the worst first.
        failed: why nothing is known of the folder; None where it was examined.
        not_compared: why names and shapes were not compared with what a load asks for; None where they were.
        ended: set when all of this is known.
    """

    folder: str
    fail_on: str = "error"
    seconds: float = 0.0
    findings: tuple[Mapping[str, Any], ...] = ()
    failed: str | None = "the examination has not ended"
    not_compared: str | None = None
    ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def wait(self, timeout: float | None = None) -> bool:
        """True once it has ended."""
        return self.ended.wait(timeout)

    @property
    def glance(self) -> Glance:
        """What it found, in a line."""
        return glance_of(self.folder, self.findings, self.fail_on, failed=self.failed, not_compared=self.not_compared)

    def error(self) -> BrokenCheckpoint | None:
        """What strict training stops with; None where it was examined and nothing is as bad as `fail_on`."""
        if self.failed is not None:
            return BrokenCheckpoint(
                "checkpoint-not-examined",
                f"the checkpoint could not be examined: {self.failed}",
                where=self.folder,
                next=Command("doctor", (as_argument(self.folder),)),
            )
        if not (bad := self.glance.bad):
            return None
        settings = [text for f in bad if (text := what_to_set(str(f["code"])))]
        step: Next = "; ".join(dict.fromkeys(settings)) or Command("doctor", (as_argument(self.folder),))
        return BrokenCheckpoint(
            "broken-checkpoint",
            "what was just saved is broken; the weights are still in memory: "
            + " ".join(f"{f['code']}: {f['message']}" for f in bad),
            where=self.folder,
            next=step,
        )


def examine_after_save(
    folder: str | Path,
    *,
    strict: bool = False,
    for_: str | None = None,
    deep: bool = False,
    fail_on: str = "error",
    ignore: Sequence[str] = (),
    rank: int | None = None,
    timeout: float = TIMEOUT,
) -> Examination | None:
    """Examine what was just saved, by doctor in a child process; one line is logged.

    Every rank has to have ended its save: call it after the trainer's own barrier.

    Args:
        folder: what was saved.
        strict: wait for the child, and raise where the checkpoint is broken or could not be examined. Otherwise the
            child runs while training goes on, and the line is logged when it ends.
        for_: a trainer: what its loader does with the folder.
        deep: read values too.
        fail_on: the least severity that strict raises for: `error`, `changes-numbers` or `cosmetic`.
        ignore: codes to leave out.
        rank: None: torch.distributed's, else `RANK`; ranks but 0 return None.
        timeout: seconds after which the child is ended.

    Raises:
        BrokenCheckpoint: with `strict`, see there.
    """
    if (this_rank() if rank is None else rank) != 0:
        return None
    words = ["--fail-on", fail_on, *(["--for", for_] if for_ else []), *(["--deep"] if deep else [])]
    words += [word for code in ignore for word in ("--ignore", code)]
    running = Examination(str(folder), fail_on)
    if strict:
        _examine(running, words, timeout)
        if (error := running.error()) is not None:
            raise error
        return running
    # Not a daemon: a run that ends right after its last save still hears of it.
    threading.Thread(target=_examine, args=(running, words, timeout), name="rlhf-convert doctor").start()
    return running


def this_rank() -> int:
    """The rank of this process: torch.distributed's where it is in use, else the launcher's, else 0."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def _examine(running: Examination, words: Sequence[str], timeout: float) -> None:
    began = time.monotonic()
    # -P: a folder named `converter` in the training's folder is not this package.
    command = [sys.executable, "-P", "-m", "converter", "doctor", as_argument(running.folder), "--json", *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False, env=_environment())
        _take(running, done.stdout, done.stderr.decode(errors="replace"), done.returncode)
    except subprocess.TimeoutExpired:
        running.failed = f"doctor did not end in {timeout:g} s"
    except OSError as failed:
        running.failed = f"doctor could not be started: {failed.strerror or failed}"
    finally:
        if running.failed is not None and not Path(running.folder).exists():
            running.failed = "the folder is gone, or never was"
        running.seconds = time.monotonic() - began
        _log(running)
        running.ended.set()


def _take(running: Examination, out: bytes, err: str, code: int) -> None:
    """What the child printed, as what was found; `failed` stays where it is not doctor's report."""
    try:
        told = json.loads(out)
        if "error" in told:
            running.failed = str(told["error"].get("what"))
            return
        running.findings, running.not_compared = tuple(told["findings"]), told["not_compared"]
    except (ValueError, TypeError, KeyError, AttributeError):
        last = err.strip().splitlines()[-1:] or [f"exit code {code}"]
        running.failed = f"doctor said nothing that is understood: {last[0]}"
        return
    running.failed = None


def _environment() -> dict[str, str]:
    """The child takes no accelerator and no part in the run."""
    left_out = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RLHF_CONVERT_DEBUG"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


def _log(running: Examination) -> None:
    glance = running.glance
    level = {"error": logging.ERROR, "sound": logging.INFO}.get(glance.word, logging.WARNING)
    LOGGER.log(level, "%s", glance.line)
