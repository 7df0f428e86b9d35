"""Every refusal that any test meets on the command line is held to the same rules: what it prints can be typed.

Each test that runs the command line in this process takes part (see `conftest.py`): an error ends with a command of the
user's own words, without blanks, with no option twice. With `WALK=FILE` in the environment its commands are also typed
into a shell, there and then, and have to lead on; `FILE` gets a line of JSON for each command line:

    python tests/support/walk_along.py [TEST FILES]

runs test files so, one after the other, and prints what was reached, typed and found. Tests that put a broken file
system or a fault of the network under the program take no part in that: a shell has its own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_walk import Walk, faults
from converter.diagnostic import Command, Next, commands, parts
from converter.errors import ConvertError
from served_shell import Said, Shell

FAILS = (2, 3, 4)
MOST_ALIKE = 2
"""How often commands of one shape are typed: of one code, one verb and the same options."""


def broken_rules(error: ConvertError, typed: list[str]) -> list[str]:
    """What is wrong with the words that an error ends with."""
    if error.exit_code not in FAILS:
        return []
    wrong = [] if commands(error.next) else [f"{error.code} ends without a command: {error.next}"]
    return wrong + [f"{error.code}: {why}: {each}" for each in commands(error.next) for why in faults(str(each), typed)]


class Along:
    """Types what errors print, where they were met, and writes down what came of it."""

    def __init__(self, report: Path) -> None:
        self.report = report
        self._shell: Shell | None = None
        self._typed: Counter[tuple[str, ...]] = Counter()

    def met(self, error: ConvertError, words: list[str]) -> None:
        """An error that a command line ended with."""
        line = shlex.join(["rlhf-convert", *words])
        wrong, typed = broken_rules(error, words), 0
        if error.exit_code in FAILS and self._is_new(error, words):
            self._shell = self._shell or Shell()
            walk = Walk(self._shell, Path.cwd())
            walk.follow_error(line, _said(error))
            wrong, typed = [*wrong, *walk.wrong], walk.typed
        value = {"code": error.code, "verb": words[0] if words else "", "line": line, "typed": typed, "wrong": wrong}
        with self.report.open("a") as file:
            file.write(json.dumps(value) + "\n")

    def _is_new(self, error: ConvertError, words: list[str]) -> bool:
        shapes = [w for each in commands(error.next) for w in each.words if w.startswith("--") or w in each.words[:2]]
        shape = (error.code, words[0], *shapes)
        self._typed[shape] += 1
        return self._typed[shape] <= MOST_ALIKE


def _said(error: ConvertError) -> Said:
    steps = tuple({"text": str(p)} | ({"command": list(p.words)} if isinstance(p, Command) else {}) for p in _of(error))
    return Said(error.code, error.what, error.where, "error", error.exit_code, steps)


def _of(error: ConvertError) -> Iterator[Next]:
    yield from parts(error.next)


def watched(complete: Any, along: Along | None) -> Any:
    """`converter.cli`'s completion of an error, followed by a look at what it made."""

    def look(error: ConvertError, words: list[str]) -> None:
        complete(error, words)
        if along is not None:
            along.met(error, words)
        elif wrong := broken_rules(error, words):
            raise AssertionError(wrong)

    return look


def main() -> int:
    """Run test files with the walk along, and print what is wrong, how much was typed, and which codes were met."""
    here = Path(__file__).resolve().parents[1]
    files = sys.argv[1:] or [str(p) for p in sorted(here.glob("*/test_*.py"))]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report"
        report.touch()
        for file in files:
            command = [sys.executable, "-m", "pytest", "-q", "-n0", "-x", "--no-header", file]
            subprocess.run(command, env={**os.environ, "WALK": str(report)}, check=False)
        met = [json.loads(each) for each in report.read_text().splitlines()]
    for each in met:
        for why in each["wrong"]:
            print(f"{each['line']}: {why}")
    reached = sorted({each["code"] for each in met})
    wrong = sum(len(each["wrong"]) for each in met)
    figures = {"command_lines": len(met), "typed": sum(each["typed"] for each in met), "codes": len(reached)}
    print(json.dumps({**figures, "wrong": wrong, "reached": reached}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
