"""Launch scripts that do not fit the folder that they name."""

from __future__ import annotations

from breakages.sound import Breakage

SCRIPTS: dict[str, Breakage] = {}
