"""What lies in a folder, broken or not: the raw material of `inspect` and of refusals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from converter.dtypes import TensorInfo
from converter.errors import Refused, fold, show

FaultSeverity = Literal["error", "changes-numbers", "cosmetic"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, with what it concerns; an `error` is what `open` refuses."""

    code: str
    severity: FaultSeverity
    text: str
    where: str
    next: str | None = None

    def refusal(self) -> Refused:
        """The fault as an error."""
        return Refused(self.code, self.text, where=self.where, next=self.next)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor found in a file: `offset` is absolute, in bytes."""

    info: TensorInfo
    file: str
    offset: int


@dataclass
class Survey:
    """Files with their sizes, tensors by name, and faults.

    Attributes:
        files: weight files in order, name mapped to size in bytes.
        entries: tensors in file order.
    """

    root: Path
    files: dict[str, int] = field(default_factory=dict)
    entries: dict[str, StoredTensor] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def error(self) -> Refused | None:
        """The refusal that the faults amount to: the first error, and how many more there are."""
        errors = [f for f in self.faults if f.severity == "error"]
        if not errors:
            return None
        refusal = errors[0].refusal()
        if len(errors) > 1:
            refusal.what += f" (and {len(errors) - 1} more faults; rlhf-convert inspect {show(self.root)} lists them)"
        return refusal


def empty_tensors(names: Iterable[str], total: int, where: str) -> Fault:
    """The fault of tensors that ZeRO-3 saved without gathering."""
    found = list(names)
    return Fault(
        "zero3-empty-tensors",
        "error",
        f"{len(found)} of {total} tensors are torch.Size([0]): {fold(found)}. ZeRO-3 saved them without gathering",
        where,
        next="their values are in the run's DeepSpeed folder (global_step*), if it was kept",
    )
