"""Apply one-line mutations, each in a copy of the tree, run the tests that are named with it, and report survivors.

    python tools/mutate.py                    all of tools/mutations.toml
    python tools/mutate.py --only heads       those whose name or file matches a regular expression
    python tools/mutate.py --list

A mutation that no named test notices has survived: a test is missing. Exit code 1 where one survives, or where its old
text is not found exactly once, its tests can't be collected, or hang.
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tools" / "mutations.toml"
SECONDS = 300
"""What the named tests of one mutation may take."""


@dataclass(frozen=True)
class Mutation:
    """One change: in `file`, the text `old`, which is there once, becomes `new`, and one of `tests` fails."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text with the mutation in it.

        Raises:
            ValueError: the old text is not there exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} is {count} times in {self.file}, not once")
        return text.replace(self.old, self.new)


def mutations(path: Path = LIST) -> list[Mutation]:
    """All of the list."""
    listed = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(m["name"], m["file"], m["old"], m["new"], tuple(m["tests"])) for m in listed]


def copy_tree(to: Path) -> None:
    """The files of the checkout, as they are now."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)


@contextmanager
def mutated(copy: Path, mutation: Mutation, stamp: int) -> Iterator[None]:
    """The copy with the mutation in it; `stamp` is another for each, so that no byte code of another is taken."""
    path = copy / mutation.file
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutation.applied(before), encoding="utf-8")
        os.utime(path, (stamp, stamp))
        yield
    finally:
        path.write_text(before, encoding="utf-8")
        os.utime(path, (stamp + 1, stamp + 1))


def preload() -> None:
    """Import once what every test needs and no mutation touches; each run is a fork of this process."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"})
    os.environ.update({"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"})
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401


def run_tests(copy: Path, tests: tuple[str, ...], log: Path) -> int:
    """pytest's exit code for some tests of the copy, in a process of its own; -1 where it hangs."""
    child = os.fork()
    if child == 0:
        _become_pytest(copy, tests, log)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def _become_pytest(copy: Path, tests: tuple[str, ...], log: Path) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 3
    try:
        os.chdir(copy)
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p) not in (ROOT, ROOT / "tools"))]
        os.environ["PYTHONPATH"] = str(copy)
        import pytest

        # What is imported beforehand can't be rewritten by pytest; no plug-in's assertions are of interest here.
        warned = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        plain = ["-q", "-x", "-n", "0", "-m", "", "-p", "no:cacheprovider", "--tb=line"]
        code = int(pytest.main([*plain, *warned, *tests]))
    except BaseException:  # whatever it is, this process must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


WORDS = {0: "SURVIVED", 1: "killed", -1: "HANGS"}


def main() -> int:
    """Prints a line for each mutation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression for names and files")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--from", dest="path", type=Path, default=LIST, help="another list")
    given = parser.parse_args()
    chosen = [m for m in mutations(given.path) if re.search(given.only, f"{m.name} {m.file}")]
    if given.list:
        print("\n".join(f"{m.file}: {m.name}" for m in chosen))
        return 0
    preload()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy, log = Path(folder, "tree"), Path(folder, "log")
        copy_tree(copy)
        for room in ("converter", "tests"):  # byte code for all runs, and not anew in each
            compileall.compile_dir(copy / room, quiet=2)
        for number, mutation in enumerate(chosen):
            begun = time.monotonic()
            try:
                with mutated(copy, mutation, 1_000_000_000 + 2 * number):
                    code = run_tests(copy, mutation.tests, log)
            except (ValueError, OSError) as error:
                print(f"NOT APPLIED {error}", flush=True)
                wrong.append(mutation.name)
                continue
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
            word = WORDS.get(code, f"BROKEN (pytest exits with {code})")
            print(f"{word:<9} {time.monotonic() - begun:6.1f} s  {mutation.name}  {' '.join(failed)}", flush=True)
            if code != 1:
                wrong.append(mutation.name)
                if code != 0:
                    print(log.read_text(errors="replace")[-2000:], flush=True)
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} killed" + "".join(f"\n  not killed: {name}" for name in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
