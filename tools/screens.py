"""The screens of README and docs: which there are, what their commands print, and which differences do not count."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh-CN.md", *sorted(str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("docs/*.md")))
"""Documents that may have screens."""

LEFT_OUT = "..."
"""A line of a screen that stands for lines which the page leaves out."""

VARIES = re.compile(r"[\d.]+ [KMGT]?B free|\d+:\d\d$|\d+ MB memory", re.MULTILINE)
"""Free disk, seconds, and the memory that as many threads as there are cores need."""

_SCREEN = re.compile(r"^```(?:console)?\n(\$ rlhf-convert .*\n)((?:.*\n)*?)```$", re.MULTILINE)


@dataclass(frozen=True)
class Screen:
    """A command as a page shows it, with the lines that it prints."""

    command: str
    lines: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """What follows the program's name, as a shell splits it."""
        return shlex.split(self.command)[1:]

    def fits(self, printed: list[str]) -> bool:
        """Whether the command prints this: all of it, but for what varies and what the page leaves out."""
        pattern = "".join(r"(?:.*\n)+?" if line == LEFT_OUT else re.escape(_plain(line)) + r"\n" for line in self.lines)
        return re.fullmatch(pattern, "".join(_plain(line) + "\n" for line in printed)) is not None

    def renewed(self, printed: list[str]) -> Screen:
        """The screen of today, with the same lines left out as far as they can be recognised."""
        if LEFT_OUT not in self.lines:
            return Screen(self.command, tuple(printed))
        kept = _kept([line for line in self.lines if line != LEFT_OUT], printed)
        lines: list[str] = []
        for number, line in enumerate(printed):
            if number in kept:
                lines.append(line)
            elif not lines or lines[-1] != LEFT_OUT:
                lines.append(LEFT_OUT)
        return Screen(self.command, tuple(lines))


def _plain(line: str) -> str:
    return VARIES.sub("…", line.rstrip())


def _kept(wanted: list[str], printed: list[str]) -> set[int]:
    """Numbers of the printed lines that are nearest to those wanted, in order."""
    kept: set[int] = set()
    start = 0
    for line in wanted:
        near = difflib.get_close_matches(line, printed[start:], n=1, cutoff=0.5)
        if near:
            start = printed.index(near[0], start) + 1
            kept.add(start - 1)
    return kept


def screens(text: str) -> list[Screen]:
    """Every screen of a page, in order."""
    return [Screen(m[1].removeprefix("$ ").rstrip(), tuple(m[2].splitlines())) for m in _SCREEN.finditer(text)]


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """A folder with the shipped checkpoints, current, for the screens of one page; they are run there in order."""
    for each in (REPOSITORY / "fixtures").iterdir():
        shutil.copytree(each, folder / each.name)
    before, locale = Path.cwd(), {name: os.environ.pop(name, None) for name in ("LC_ALL", "LC_MESSAGES", "LANG")}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.update({name: value for name, value in locale.items() if value is not None})


def printed(screen: Screen) -> list[str]:
    """What the command prints: its answer, or where there is none its error."""
    from converter.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(screen.arguments)
    return [line.rstrip() for line in (out.getvalue() or err.getvalue()).splitlines()]


def renewed_page(text: str) -> str:
    """A page with its screens as the commands print them today; to be called in a workplace."""

    def renew(match: re.Match[str]) -> str:
        (old,) = screens(match[0])
        lines = printed(old)
        if old.fits(lines):
            return match[0]
        return f"```console\n{match[1]}" + "".join(f"{line}\n" for line in old.renewed(lines).lines) + "```"

    return _SCREEN.sub(renew, text)
