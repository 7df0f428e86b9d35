"""`rlhf-convert verify`: proof that a trainer loads a folder, and that it says what its source said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from converter.blanks import without_blanks
from converter.cli.progress import progress
from converter.cli.report.asked import expect_report
from converter.cli.report.writing import write_report
from converter.diagnostic import Command, Next, as_argument, commands
from converter.dialects.known import Target
from converter.errors import VerificationFailed
from converter.examine.verify.check import Check
from converter.recipe.verbs import verify as verb
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.options import Display

MARKS = {"holds": "ok  ", "note": "note", "fails": "FAIL"}


def verify(folder: str, options: Display, *, report_to: str | None = None, **knobs: Any) -> int:
    """Verify a folder; exit code 0, or 4 where a check fails."""
    expect_report(report_to)
    sink = options.sink
    with progress(sink) as reporter:
        found = verb.verify(folder, told=sink.tell, reporter=reporter, **knobs)
    broken = found.failed
    sink.screen([f"{show(folder)}: for {found.aim.words} as {found.aim.role}"])
    sink.screen(f"{MARKS[c.outcome]} {c.label:<8} {c.text}" for c in found.checks)
    if found.table:
        from converter.examine.verify.pairs import table_lines

        sink.screen(table_lines(found.table))
    following = _next(folder, found.aim, broken)
    verdict = "verified" if not broken else f"{len(broken)} of {len(found.checks)} checks fail"
    sink.screen([verdict])
    from converter.cli.lines import next_lines

    sink.screen(next_lines(following))
    sink.json(
        {
            "folder": folder,
            "for": found.aim.words,
            "role": found.aim.role,
            "verified": not broken,
            "checks": [c.to_json() for c in found.checks],
            "pairs": list(found.table),
            "next": list(map(str, following)),
        }
    )
    if report_to is not None:
        from converter.cli.report.of_reading import page_of_verify

        write_report(report_to, sink, lambda: page_of_verify(folder, found, following))
    return VerificationFailed.exit_code if broken else 0


def _next(folder: str, aim: Target, broken: Sequence[Check]) -> list[Next]:
    """What fixes it; or the trainer's launch line and its traps."""
    if broken:
        found = list(dict.fromkeys(step for c in broken if (step := without_blanks(c.next))))
        return found if any(map(commands, found)) else [*found, Command("doctor", (as_argument(folder),))]
    from converter.sources.hub.names import as_reference, hub_name

    path = folder if folder.startswith(("/", ".", "~")) else f"./{folder}"
    if (named := hub_name(as_reference(folder))) is not None:
        path = named.repo_id  # as trainers take it
    lines: list[Next] = []
    if aim.serves.launch:
        lines.append(aim.serves.launch_line(path))
    return [*lines, *(f"# {trap}" for trap in aim.traps)]
