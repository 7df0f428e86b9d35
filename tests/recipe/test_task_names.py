"""Which task a process is: as typed, or as its scheduler says in the environment."""

from __future__ import annotations

import pytest

from converter.errors import UsageError
from converter.recipe.verbs.task import task_of


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/8", {}, "2/8"),
        ("1/1", {"RANK": "5", "WORLD_SIZE": "6"}, "1/1"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "10", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "8"}, "3/4"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "16"}, "1/16"),
        ("auto", {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, "4/4"),
        ("auto", {"PMI_RANK": "1", "PMI_SIZE": "2"}, "2/2"),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, "8/8"),
        ("auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "1/2"),
    ],
)
def test_a_task_is_counted_from_one(text: str, environment: dict[str, str], expected: str) -> None:
    assert str(task_of(text, environment)) == expected


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("0/2", {}),
        ("3/2", {}),
        ("-1/2", {}),
        ("1", {}),
        ("auto", {}),
        ("auto", {"JOB_COMPLETION_INDEX": "7"}),
        ("auto/4", {"JOB_COMPLETION_INDEX": "7"}),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}),
    ],
)
def test_what_names_no_task_is_a_usage_error(text: str, environment: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        task_of(text, environment)
