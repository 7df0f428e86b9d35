"""One text as it is printed, for each message that `explain` knows, by the message's code."""

from __future__ import annotations

import tomllib
from pathlib import Path

PRINTED: dict[str, str] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
