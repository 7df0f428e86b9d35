"""Builds environments with the trainers' own code and runs the tests marked `trainer` in them.

    python tests/trainers/run_trainers.py                   builds what is missing, runs the tests, writes matrix.md
    python tests/trainers/run_trainers.py --build openrlhf  builds one environment, anew if its description has changed
    python tests/trainers/run_trainers.py --list

Environments lie outside of the repository (`--envs`, by default below the user's cache), since they take some 6 GB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from environments import CORE, ENVIRONMENTS, Environment  # noqa: E402

DEFAULT = Path("~/.cache/rlhf-convert-trainers").expanduser()
MARK = "description.txt"


def build(envs: Path, names: list[str], constraints: Path) -> list[str]:
    """Build the environments that are missing or were described otherwise; names of those that failed."""
    envs.mkdir(parents=True, exist_ok=True)
    core = envs / "core"
    if not _is_current(core, repr(CORE)):
        _create(core, repr(CORE), lambda python: _pip(python, ["-c", str(constraints), *CORE]))
    failed = []
    for name in names:
        each = ENVIRONMENTS[name]
        if _is_current(envs / name, repr(each)):
            continue
        try:
            _create(envs / name, repr(each), lambda python, each=each: _install(python, core, each))  # type: ignore[misc]
        except subprocess.CalledProcessError as error:
            print(f"{name}: not built: {error}", file=sys.stderr)
            failed.append(name)
    return failed


def _is_current(folder: Path, description: str) -> bool:
    mark = folder / MARK
    return mark.is_file() and mark.read_text(encoding="utf-8") == description


def _create(folder: Path, description: str, fill: object) -> None:
    print(f"building {folder}", flush=True)
    if folder.exists():
        shutil.rmtree(folder)
    venv.create(folder, with_pip=True)
    fill(folder / "bin" / "python")  # type: ignore[operator]
    (folder / MARK).write_text(description, encoding="utf-8")


def _install(python: Path, core: Path, each: Environment) -> None:
    """The trainer bare, then its stack; what `core` has comes after what the environment has itself."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = Path("lib") / version / "site-packages"
    (python.parents[1] / site / "core.pth").write_text(f"{core / site}\n", encoding="utf-8")
    _pip(python, list(each.stack))
    _pip(python, ["--no-deps", *each.bare])


def _pip(python: Path, arguments: list[str]) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments], check=True)


def main() -> int:
    """Build, then test; the exit code is pytest's, or 1 where an environment could not be built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=DEFAULT, help="where the environments are")
    parser.add_argument("--build", nargs="*", metavar="NAME", help="only build; without a name, all of them")
    parser.add_argument("--list", action="store_true", help="name the environments")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    asked = parser.parse_args()
    if asked.list:
        for each in ENVIRONMENTS.values():
            print(f"{each.name:<16} {each.trainer:<20} {' '.join(each.bare)}; {' '.join(each.stack)}")
        return 0
    names = list(asked.build or ENVIRONMENTS)
    failed = build(asked.envs, names, HERE.parents[1] / "constraints.txt")
    if asked.build is not None:
        return 1 if failed else 0
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "trainer", str(HERE), *asked.pytest]
    here = {"RLHF_CONVERT_TRAINERS": str(asked.envs), "RLHF_CONVERT_MATRIX": str(HERE / "matrix.md")}
    done = subprocess.run(command, env=os.environ | here, check=False)
    return done.returncode or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
