"""`CheckpointDoctor`: a callback for transformers' Trainer and its descendants (TRL's SFT, reward, DPO, LLaMA-Factory).

    trainer = Trainer(..., callbacks=[CheckpointDoctor(strict=True)])

It needs transformers and accelerate, which a run with a Trainer has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, wait_for_everyone
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from converter.integrations.after_save import TIMEOUT, BrokenCheckpoint, Examination, examine_after_save


class CheckpointDoctor(TrainerCallback):  # type: ignore[misc]  # transformers has no types that are read here
    """Examines every checkpoint right after it is saved, on rank 0, in a child process; logs one line each.

    With `strict`, every rank waits for the child and raises `BrokenCheckpoint` where the checkpoint is broken: training
    stops at the first bad save, with the weights in memory. Without, training goes on, and its end waits for the lines.

    Attributes:
        examined: what was examined, on rank 0, in order.
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        for_: str | None = None,
        deep: bool = False,
        fail_on: str = "error",
        ignore: Sequence[str] = (),
        timeout: float = TIMEOUT,
    ) -> None:
        self.strict = strict
        self.examined: list[Examination] = []
        self._knobs: dict[str, Any] = {
            "for_": for_, "deep": deep, "fail_on": fail_on, "ignore": tuple(ignore), "timeout": timeout
        }  # fmt: skip

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> None:
        """Examine `checkpoint-STEP`; called on every rank.

        Raises:
            BrokenCheckpoint: with `strict`, on every rank.
        """
        wait_for_everyone()  # rank 0 may be done before the others' shards are
        error: BrokenCheckpoint | None = None
        if state.is_world_process_zero:
            running = examine_after_save(_saved(args, state), rank=0, **self._knobs)
            assert running is not None
            self.examined.append(running)
            if self.strict:
                running.wait()
                error = running.error()
        if not self.strict:
            return
        told = broadcast_object_list([None if error is None else error.to_words()])[0]
        if told is not None:
            raise BrokenCheckpoint.of_words(told)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Wait for what is still being examined."""
        for each in self.examined:
            each.wait()


def _saved(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that Trainer has just saved; in a search for hyperparameters it is in a folder of the trial's."""
    name = f"checkpoint-{state.global_step}"
    own = Path(args.output_dir) / name
    if own.exists():
        return own
    trials = sorted(Path(args.output_dir).glob(f"run-*/{name}"), key=os.path.getmtime)
    return trials[-1] if trials else own
