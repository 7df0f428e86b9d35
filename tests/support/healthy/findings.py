"""What doctor finds in a healthy folder."""

from __future__ import annotations

from pathlib import Path

from converter.examine.doctor import DoctorRequest, examine


def serious(folder: Path, **asked: object) -> list[str]:
    """What doctor says that is worse than cosmetic, with its reason."""
    found = examine(DoctorRequest(str(folder), **asked)).findings  # type: ignore[arg-type]
    return [f"{f.severity} {f.code}: {f.text}" for f in found if f.severity != "cosmetic"]


def codes(folder: Path, **asked: object) -> list[str]:
    return [text.split()[1].rstrip(":") for text in serious(folder, **asked)]
