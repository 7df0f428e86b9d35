"""Which share of an output a process writes: `2/8`, or what a scheduler tells its processes in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from converter.errors import UsageError
from converter.text import show

if TYPE_CHECKING:
    from converter.core.writer.tasks import Task

_TYPED = re.compile(r"([0-9]{1,6})/([0-9]{1,6})", re.ASCII)
_AUTO = re.compile(r"auto(?:/([0-9]{1,6}))?", re.ASCII)

SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", ""),
    ("RANK", "WORLD_SIZE", ""),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),
    ("PMI_RANK", "PMI_SIZE", ""),
    ("SLURM_PROCID", "SLURM_NTASKS", ""),
)
"""Variables with a process's number, how many there are, and the first number where it is not 0: of a SLURM array,
Kubernetes (whose indexed jobs say no count: `auto/8` does), torchrun, Open MPI, MPICH and SLURM's own steps.

Sources: https://slurm.schedmd.com/job_array.html, https://kubernetes.io/docs/concepts/workloads/controllers/job,
https://docs.pytorch.org/docs/stable/elastic/run.html, https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html
"""


def task_of(text: str, environment: Mapping[str, str]) -> Task:
    """The task that `text` means.

    Raises:
        UsageError: neither `k/n` with k from 1 to n, nor `auto` where a scheduler says both numbers (`usage`).
    """
    if typed := _TYPED.fullmatch(text):
        return _task(int(typed[1]), int(typed[2]), text)
    if not (auto := _AUTO.fullmatch(text)):
        raise UsageError("usage", f"--task takes K/N or auto, not {show(text)}", expected="2/8, auto or auto/8")
    for number, count, first in SCHEDULERS:
        found = [_integer(environment.get(name)) for name in (number, count, first)]
        total = int(auto[1]) if auto[1] else found[1]
        if found[0] is not None and total is not None:
            return _task(found[0] - (found[2] or 0) + 1, total, f"{number}={environment[number]}")
    names = ", ".join(number for number, _, _ in SCHEDULERS)
    what = f"--task {text}: no scheduler says which task of how many this is; looked for {names}"
    raise UsageError("usage", what, expected="K/N, or auto/N where only the number is known")


def _task(number: int, count: int, said: str) -> Task:
    from converter.core.writer.tasks import Task

    if not 1 <= number <= count:
        raise UsageError("usage", f"there is no task {number} of {count} ({show(said)})", expected="1/N to N/N")
    return Task(number, count)


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch("[0-9]{1,9}", text) else None
