"""A headless Chromium, where there is one: `chromium` on the PATH, or the program that $CHROMIUM names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

_QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0")


def browse(page: Path, home: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Open a page with a profile of its own, no network: names resolve to nothing."""
    assert CHROMIUM is not None
    line = [CHROMIUM, *_QUIET, f"--user-data-dir={home}", "--host-resolver-rules=MAP * ~NOTFOUND", *more, page.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page itself said: errors, and refusals of its policy."""
    return [each for each in done.stderr.splitlines() if "CONSOLE" in each]
