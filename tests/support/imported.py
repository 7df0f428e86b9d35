"""Which modules a command imports."""

from __future__ import annotations

import subprocess
import sys


def modules_after(*arguments: object) -> set[str]:
    """Top-level modules that a process has imported once it ran the command line, whatever that returned."""
    code = (
        "import sys; from converter.cli import main; main(sys.argv[1:]); "
        "print('\\n'.join(['', 'MODULES', *sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60
    )
    names = done.stdout.rpartition("MODULES\n")[2].split()
    return {name.split(".")[0] for name in names}


def third_party(modules: set[str]) -> set[str]:
    ours = {"__main__", "converter", "sitecustomize"}
    return {
        m for m in modules - set(sys.stdlib_module_names) - ours if not m.startswith(("_sysconfigdata", "__editable__"))
    }
