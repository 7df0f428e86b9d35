"""`rlhf-convert doctor`: the screen of a report, and its data.

`doctor --json` prints one object:

    version   1; it changes with the shape of what follows
    path      what was asked
    detected  model, adapter, training, delta, run, weights or unread
    source    the source that reads it (hf, peft, deepspeed, ...), or null
    why       how it was recognised, in words
    for       the trainer that --for or --launch names, or null
    near      folders around it: [{"path", "source"}]
    not_compared  why names and shapes were not compared with what a load asks for, or null
    findings  the worst first, each:
        code            kebab-case, stable
        severity        error, changes-numbers or cosmetic
        message         one sentence or two
        tensors         names of all tensors concerned
        evidence        at most three lines
        recoverability  here, "from SOURCE", lost, or empty where nothing is missing
        fix             names of converters that fix it, in order
        applicability   safe, unsafe (needs --allow CODE) or display-only
        next            the exact next command or step, or null
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from converter.cli.lines import line, next_lines, wrapped_step
from converter.cli.progress import progress
from converter.cli.report.asked import expect_report
from converter.cli.report.writing import write_report
from converter.diagnostic import is_command
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.options import Display
    from converter.examine.diagnoses.case import Case, Finding
    from converter.examine.doctor import Report

WIDTH = 79
"""Columns that every line of a report fits into, but for names and commands, which are never cut."""

WORDS = {"error": "ERROR", "changes-numbers": "NUMBERS", "cosmetic": "note"}
"""How a screen says each severity."""
_KINDS = {
    "model": "model",
    "adapter": "adapter",
    "training": "shards of a training run",
    "delta": "the difference of two models",
    "run": "a run's folder",
    "weights": "a weight file without a config",
    "unread": "a layout that is not read",
}


def doctor(path: str, fail_on: str, options: Display, *, report_to: str | None = None, **knobs: Any) -> int:
    """Examine a folder; exit code 1 where a finding is as bad as `fail_on` or worse."""
    from converter.examine.doctor import at_or_above
    from converter.recipe.verbs.doctor import doctor

    expect_report(report_to)
    with progress(options.sink) as reporter:
        report = doctor(path, reporter=reporter, **knobs)
    code = 1 if at_or_above(fail_on, report.findings) else 0
    options.sink.screen([*screen(report, verbose=options.verbose), _verdict(report, code)])
    options.sink.json(to_json(report))
    if report_to is not None:
        from converter.cli.report.of_reading import page_of_doctor

        write_report(report_to, options.sink, lambda: page_of_doctor(report))
    return code


def to_json(report: Report) -> dict[str, Any]:
    """The report as data; `version` changes with its shape."""
    case = report.case
    return {
        "version": 1,
        "path": case.asked,
        "detected": case.kind,
        "source": case.source,
        "why": case.why,
        "for": case.target,
        "near": [{"path": n.asked, "source": n.source} for n in case.near],
        "not_compared": report.not_compared or None,
        "findings": [f.to_json() for f in report.findings],
    }


def screen(report: Report, *, verbose: bool = False) -> list[str]:
    """The findings as lines, and the commands that they lead to."""
    lines = [*_title(report.case), *_near(report)]
    from converter.examine.diagnoses.causes import commands_of

    for finding in report.findings:
        lines += _finding(finding, verbose=verbose)
    return [*lines, *next_lines(commands_of(report.findings))]


def _title(case: Case) -> list[str]:
    lines = [
        f"{show(case.asked)}: {_KINDS[case.kind]}{f' ({case.source})' if case.kind == 'training' else ''}, {case.why}"
    ]
    if case.base is not None:
        lines.append(line("base", f"{show(case.base.asked)}, at hand"))
    elif case.adapter_config:
        recorded = case.adapter_config.get("base_model_name_or_path")
        is_named = isinstance(recorded, str) and bool(recorded)
        what = f"{show(recorded)}, neither here nor in the Hub's cache" if is_named else "not recorded"
        lines.append(line("base", f"{what}; --base names it, and doctor compares"))
    return lines


def _near(report: Report) -> list[str]:
    """Folders that may hold what is missing; no news where nothing is."""
    if report.worst() != "error":
        return []
    places = [n for n in report.case.near if n.is_training or n.given]
    return [line("near", f"{show(n.asked)} ({n.source})") for n in places[:4]]


def _finding(finding: Finding, *, verbose: bool) -> list[str]:
    head = f"{WORDS[finding.severity]} {finding.code}"
    if finding.recoverability:
        head = (
            f"{head:<36} recoverable: {finding.recoverability}"
            if finding.recoverability != "lost"
            else f"{head:<36} lost"
        )
    lines = [head]
    lines += textwrap.wrap(finding.text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    for each in finding.evidence:
        is_prose = each.startswith(("expected ", "got ", "base: "))
        lines += _wrapped(each, "    ") if is_prose else [f"    {each}"]
    if verbose:
        lines += [f"      {show(name)}" for name in finding.tensors]
    if finding.next and not is_command(finding.next):
        lines += wrapped_step(finding.next, WIDTH, "  -> ")
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False)


def _verdict(report: Report, code: int) -> str:
    counts = {s: sum(f.severity == s for f in report.findings) for s in WORDS}
    words = {"error": "error", "changes-numbers": "that changes numbers", "cosmetic": "cosmetic"}
    listed = ", ".join(f"{n} {words[s]}{'s' if s == 'error' and n > 1 else ''}" for s, n in counts.items() if n)
    without = f"; {report.not_compared}" if report.not_compared else ""
    return f"{listed or 'no finding'}{without}, exit {code}"
