"""Runs several probes in one process, since importing a trainer takes longer than loading a tiny model.

    PY probe_many.py JOBS.json

JOBS.json lists argument lists; the first of each is the probe script. A script that fails leaves no report.
"""

from __future__ import annotations

import json
import runpy
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Run them one after the other, each as if it were alone."""
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        sys.argv = job
        sys.path.insert(0, str(Path(job[0]).parent))
        try:
            runpy.run_path(job[0], run_name="__main__")
        except (Exception, SystemExit):
            traceback.print_exc()


if __name__ == "__main__":
    main()
