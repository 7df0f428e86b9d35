"""Which modules a command imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

_EACH = """
import json, os, sys
from converter.cli import main
asked = json.loads(sys.argv[1])
for arguments in asked:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            main(arguments)
        finally:
            os.write(writer, " ".join(sys.modules).encode())
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        names = pipe.read().split()
    os.waitpid(child, 0)
    print(json.dumps(names))
"""


def modules_after_each(command_lines: Sequence[Sequence[str]]) -> list[set[str]]:
    """Top-level modules that a process has imported once it ran each command line, whatever that returned.

    The processes are forks of one that has imported the command line and nothing else.
    """
    words = [sys.executable, "-c", _EACH, json.dumps([list(c) for c in command_lines])]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    return [{name.split(".")[0] for name in json.loads(line)} for line in done.stdout.splitlines()]


def third_party(modules: set[str]) -> set[str]:
    ours = {"__main__", "converter", "sitecustomize"}
    return {
        m for m in modules - set(sys.stdlib_module_names) - ours if not m.startswith(("_sysconfigdata", "__editable__"))
    }
