"""`rlhf-convert verify`: proof that a trainer loads a folder, and that it says what its source said."""

from __future__ import annotations

from converter.cli.options import Display
from converter.core.files import sparse
from converter.diagnostic import Next
from converter.dialects.known import Target
from converter.errors import UsageError, VerificationFailed
from converter.examine.verify.check import Check, failed
from converter.examine.verify.verify import VerifyRequest, examine
from converter.text import show

MARKS = {"holds": "ok  ", "note": "note", "fails": "FAIL"}


def verify(asked: VerifyRequest, options: Display) -> int:
    """Verify a folder; exit code 0, or 4 where a check fails."""
    _expect_sense(asked)
    found = examine(asked)
    sparse.expect_all_read()
    broken = failed(found.checks)
    sink = options.sink
    sink.screen([f"{show(asked.folder)}: for {found.aim.words} as {found.aim.role}"])
    sink.screen(f"{MARKS[c.outcome]} {c.label:<8} {c.text}" for c in found.checks)
    if found.table:
        from converter.examine.verify.pairs import table_lines

        sink.screen(table_lines(found.table))
    commands = _next(asked, found.aim, broken)
    verdict = "verified" if not broken else f"{len(broken)} of {len(found.checks)} checks fail"
    sink.screen([verdict])
    from converter.cli.lines import next_lines

    sink.screen(next_lines(commands))
    sink.json(
        {
            "folder": asked.folder,
            "for": found.aim.words,
            "role": found.aim.role,
            "verified": not broken,
            "checks": [c.to_json() for c in found.checks],
            "pairs": found.table,
            "next": list(map(str, commands)),
        }
    )
    return VerificationFailed.exit_code if broken else 0


def _expect_sense(asked: VerifyRequest) -> None:
    """Flags that need each other.

    Raises:
        UsageError: `--live` without `--python`, or a source's flag without a source (`usage`).
    """
    if asked.live and not asked.python:
        what = "--live loads the folder with the trainer's own code: name the Python that has it"
        raise UsageError("usage", what, expected="--live --python ~/envs/ppo/bin/python")
    if asked.python and not asked.live:
        raise UsageError("usage", "--python goes with --live")
    if (asked.base or asked.source) and not asked.against:
        raise UsageError("usage", "--base and --from say how --against is read; there is no --against")


def _next(asked: VerifyRequest, aim: Target, broken: list[Check]) -> list[Next]:
    """What mends it; or the trainer's launch line and its traps."""
    if broken:
        return list(dict.fromkeys(c.next for c in broken if c.next))
    from converter.sources.hub.names import as_reference, hub_name

    path = asked.folder if asked.folder.startswith(("/", ".", "~")) else f"./{asked.folder}"
    if (named := hub_name(as_reference(asked.folder))) is not None:
        path = named.repo_id  # as trainers take it
    lines: list[Next] = []
    if aim.serves.launch:
        lines.append(aim.serves.launch_line(path))
    return [*lines, *(f"# {trap}" for trap in aim.traps)]
