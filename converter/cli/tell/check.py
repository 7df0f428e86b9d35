"""`rlhf-convert check`: doctor in a pipeline, for people (lines), programs (JSON), and machines that show findings.

`check --format json` prints one object:

    version  1; it changes with the shape of what follows
    failed   how many checkpoints have a finding as bad as --fail-on or worse, or could not be examined
    folders  each checkpoint: path, verdict (sound, not compared, numbers, error, not examined), failed (why it could
             not be examined, or null), not_compared (why names and shapes were not compared with what a load asks for,
             or null), findings as `doctor --json` prints them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converter.cli.options import Display
from converter.examine.glance import Glance, glance_of
from converter.recipe.verbs import check as verb
from converter.recipe.verbs.watch import Examined
from converter.text import show


def check(paths: Sequence[str], fail_on: str, form: str, output: str | None, options: Display, **knobs: Any) -> int:
    """Examine every checkpoint that paths name; exit code 1 where one is as bad as `fail_on` or worse."""
    found = verb.check(paths, **knobs)
    glances = [glance_of(e.path, e.findings, fail_on, failed=e.failed, not_compared=e.not_compared) for e in found]
    bad = [g for g in glances if g.bad or g.word == "not examined"]
    sink = options.sink
    form = "json" if options.as_json else form
    if form == "text":
        sink.screen(g.line for g in glances)
        sink.screen([_verdict(paths, glances, bad)])
    else:
        document = _document(form, found, glances, fail_on)
        if output is None:
            sink.data(document)
        else:
            Path(output).write_text(f"{document}\n", encoding="utf-8")
            sink.tell(f"{_verdict(paths, glances, bad)}; {show(output)}")
    return 1 if bad else 0


def _verdict(paths: Sequence[str], glances: Sequence[Glance], bad: Sequence[Glance]) -> str:
    if not glances:
        return f"no checkpoint in {show(' '.join(paths), 80)}"
    without = sum(g.word == "not compared" for g in glances)
    more = f", {without} not compared with what a load asks for" if without else ""
    count = f"{len(glances)} checkpoint{'s' if len(glances) > 1 else ''} examined"
    return f"{count}, {len(bad)} with findings that count{more}"


def _document(form: str, found: Sequence[Examined], glances: Sequence[Glance], fail_on: str) -> str:
    if form == "junit":
        from converter.cli.tell.junit import junit

        return junit(found, fail_on)
    if form == "sarif":
        from converter.cli.tell.sarif import sarif

        return json.dumps(sarif(found), indent=2)
    folders = [
        {"path": e.path, "verdict": g.word, "failed": e.failed, "not_compared": e.not_compared}
        | {"findings": list(e.findings)}
        for e, g in zip(found, glances, strict=True)
    ]
    failed = sum(bool(g.bad) or g.word == "not examined" for g in glances)
    return json.dumps({"version": 1, "failed": failed, "folders": folders}, indent=2)
