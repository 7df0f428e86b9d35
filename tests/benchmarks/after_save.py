"""What `CheckpointDoctor` costs the training process: how long a save waits, and what its other threads take.

    python tests/benchmarks/after_save.py [--rounds 5] [--steps 40] [--every 10]

A causal language model of 7 million parameters is trained by transformers' Trainer on the CPU, saved every so many
steps, in turns with and without the callback (not strict: doctor runs while training goes on). Doctor's own work is
done by a child and is left out. What is counted is the time for which the callback holds the training's thread, and the
processor time of the process's other threads, one of which waits for the child. Prints a line of Markdown a figure.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from converter.integrations.transformers import CheckpointDoctor

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 4000,
}  # fmt: skip


class Timed(CheckpointDoctor):
    """The callback, and the seconds that it kept the training thread."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[float] = []

    def on_save(self, *args: Any, **more: Any) -> None:
        begun = time.perf_counter()
        super().on_save(*args, **more)
        self.kept.append(time.perf_counter() - begun)


class Steps(TrainerCallback):  # type: ignore[misc]
    """The processor time of threads that do not train, and the time on the clock, from the first step to the last."""

    def on_train_begin(self, *args: Any, **more: Any) -> None:
        self.begun = time.process_time() - time.thread_time(), time.perf_counter()

    def on_train_end(self, *args: Any, **more: Any) -> None:
        self.others = time.process_time() - time.thread_time() - self.begun[0]

    def on_step_end(self, *args: Any, **more: Any) -> None:
        self.wall = time.perf_counter() - self.begun[1]


def trained(steps: int, every: int, doctor: Timed | None) -> tuple[float, float]:
    """Processor seconds of threads that do not train, and seconds on the clock, of one training."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    rows = [{"input_ids": (tokens := torch.randint(0, 4000, (64,))), "labels": tokens} for _ in range(4 * steps)]
    clock = Steps()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, save_steps=every, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, save_only_model=True, logging_steps=10 * steps,
        )  # fmt: skip
        Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=[clock, *([doctor] if doctor else [])]
        ).train()
        if doctor is not None and any(each.failed or each.glance.bad for each in doctor.examined):
            raise SystemExit(f"a sound checkpoint was not called sound: {doctor.examined}")
        assert Path(folder).is_dir()
    return clock.others, clock.wall


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("rounds", 5), ("steps", 40), ("every", 10)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # the child has a core of its own, as it has on a machine that trains
    trained(asked.every, asked.every, None)  # what is imported and allocated once
    without, beside, kept = [], [], []
    for _ in range(asked.rounds):
        without.append(trained(asked.steps, asked.every, None))
        doctor = Timed()
        beside.append(trained(asked.steps, asked.every, doctor))
        kept += doctor.kept
    step = statistics.median(wall / asked.steps for _, wall in without)
    saves = asked.steps // asked.every
    others = [(b[0] - a[0]) / saves for a, b in zip(without, beside, strict=True)]
    print(f"A step takes {step * 1000:.0f} ms; {len(kept)} saves, one every {asked.every} steps.\n")
    print("| of the training process, for each save | median | min to max | of the time between saves |")
    print("|---|---|---|---|")
    for what, times in (("its thread is held", kept), ("other threads' processor time", others)):
        middle, least, most = statistics.median(times), min(times), max(times)
        share = middle / (asked.every * step)
        print(f"| {what} | {middle * 1000:.1f} ms | {least * 1000:.1f} to {most * 1000:.1f} | {share:.3%} |")


if __name__ == "__main__":
    main()
