"""Whether a report can be written where it is asked for; known before the work begins."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from converter.errors import UsageError
from converter.publish.outputs import is_remote
from converter.text import show

SUFFIXES = (".html", ".png")


def expect_report(report: str | None, out: str | None = None) -> None:
    """Refuse a report that could not be written, or that would change what is written.

    Raises:
        UsageError: another kind of file, no such folder, a place in the output, or no matplotlib (`report`).
    """
    if report is None:
        return
    path = Path(report).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError("report", f"--report {show(report)}", expected="a file that ends with .html or .png")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError("report", f"--report {show(report)}: there is no folder to write it to, or it is one itself")
    if out is not None and not is_remote(out):
        place, inside = os.path.realpath(Path(out).expanduser()), os.path.realpath(path)
        if inside == place or inside.startswith(place + os.sep):
            what = "the report would lie in the output, whose receipt names every file"
            raise UsageError("report", what, expected=f"a place beside {show(out)}")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "report", "matplotlib draws reports, and is not installed", next="pip install 'rlhf-convert[report]'"
        )
