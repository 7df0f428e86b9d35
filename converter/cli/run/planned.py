"""The screens and the data of what a verb that writes has planned and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli import lines as report
from converter.cli.lines import line
from converter.core.files.names import RECEIPT, TOKENIZER_CONFIG
from converter.core.files.strict_json import load_json
from converter.diagnostic import Again, Command, Next, Steps, as_argument, quoted
from converter.errors import ConvertError, UsageError
from converter.families.memory_names import class_names
from converter.publish.outputs import as_loaders_take_it
from converter.recipe.recipe import SOURCE
from converter.text import fold, format_size, show

if TYPE_CHECKING:
    from converter.cli.sink import Sink
    from converter.recipe.verbs.conversion import Conversion

SMALL_FILE = 4_000_000
"""Bytes of a tokenizer_config.json that are read for the name of the pad token."""


def missing_output() -> UsageError:
    """The error of a writing verb without OUT."""
    what, expected = "the output is missing", "OUT as the last argument, or --out OUT"
    return UsageError("usage", what, expected=expected, next=Steps(Again(("--out", "./NEW_FOLDER")), ", or --dry-run"))


# Plans


def plan_lines(planned: Conversion, *, verbose: bool) -> list[str]:
    """Notes, what happens to the tensors, and what it needs."""
    from converter.core.writer import preflight

    adapters = [c for c in planned.prepared.opened.values() if c.origin.kind == "adapter"]
    free = None if planned.folder is None else preflight.free_bytes(planned.folder)
    needed = preflight.needed_memory(planned.plan, planned.jobs)
    return [
        *report.note_lines(planned.notes, verbose=verbose),
        report.plan_line(planned.plan, planned.checkpoint, adapters),
        report.needs_line(planned.plan.total_bytes, free, needed),
    ]


def plans_of_two(model: Conversion, *, verbose: bool) -> list[str]:
    """The same of two outputs."""
    from converter.core.writer import preflight

    assert model.adapter is not None
    lines = report.note_lines(dict.fromkeys([*model.notes, *model.adapter.notes]), verbose=verbose)
    for word, half in (("model", model), ("adapter", model.adapter)):
        lines.append(line(word, show(half.out or "OUT is not named")))
        if half.earlier:
            lines.append(line("", "whole already: an earlier run made it, and it was compared with the plan"))
        else:
            lines.append(report.plan_line(half.plan, half.checkpoint, []))
    todo = [h for h in (model, model.adapter) if not h.earlier]
    free = None if model.folder is None else preflight.free_bytes(model.folder)
    needed = max(preflight.needed_memory(h.plan, h.jobs) for h in todo)
    return [*lines, report.needs_line(sum(h.plan.total_bytes for h in todo), free, needed)]


def dry_run(planned: Conversion, sink: Sink) -> None:
    """The plan as data."""
    sink.screen(["dry run: nothing written"])
    if planned.adapter is None:
        more = {"dropped": dict(planned.plan.dropped), "notes": notes_json(planned)}
        sink.json({"dry_run": True, **_counts(planned), **more, "repaired": dict(planned.checkpoint.repaired)})
        return
    halves = {h: {"out": x.out, **_counts(x)} for h, x in (("merged", planned), ("adapter", planned.adapter))}
    sink.json({"dry_run": True, **halves, "notes": notes_json(planned, planned.adapter)})


def _counts(planned: Conversion) -> dict[str, Any]:
    plan = planned.plan
    files = report.files_json(plan)
    return {"counts": plan.counts, "total_bytes": plan.total_bytes, "fingerprint": plan.fingerprint, "files": files}


def notes_json(*done: Conversion) -> list[dict[str, str]]:
    """A run's notes as JSON objects, each once."""
    found = [{"severity": n.severity, "code": n.code, "text": n.text} for each in done for n in each.notes]
    return [n for i, n in enumerate(found) if n not in found[:i]]


# Results


def written_lines(done: Conversion, *, verbose: bool = False) -> list[str]:
    """What was written, what was checked and what rounding cost."""
    receipt, plan = done.receipt, done.plan
    assert receipt is not None
    assert done.folder is not None
    count = len(plan.written)
    return [
        *([report.shards_line(count, count, plan.total_bytes, receipt.seconds)] if count else []),
        *report.linked_lines(plan, done.prepared.opened[SOURCE].origin.asked),
        report.checked_line(receipt.reread, receipt.recomputed, receipt.measures),
        *report.update_lines(receipt.measures, plan),
        *(report.by_projection(receipt.measures) if verbose else []),
        *source_lines(),
        report.wrote_line(str(done.out), done.checkpoint.config, _pad_token(done.folder), done.checkpoint.origin.kind),
    ]


def finish(done: Conversion, sink: Sink, commands: Sequence[Next]) -> None:
    """The screen's last lines, and what to type next."""
    assert done.receipt is not None
    sink.screen(written_lines(done, verbose=sink.verbose))
    sink.screen(report.next_lines(commands))
    sink.json(
        {
            "out": done.out,
            "receipt": dict(done.receipt.content),
            "notes": notes_json(done),
            "seconds": round(done.receipt.seconds, 3),
            "next": list(map(str, commands)),
        }
    )


def finish_task(done: Conversion, sink: Sink) -> None:
    """The screen of a task that did not end the run."""
    assert done.folder is not None
    is_there = done.folder.is_dir()
    state = "the output is there: another task ended the run" if is_there else "other tasks still write; the last ends"
    sink.screen([line("task", f"{done.task}: its files are written"), line("", state)])
    sink.json({"out": done.out, "task": str(done.task), "receipt": None, "is_published": is_there})


def finish_both(model: Conversion, sink: Sink, next_commands: Callable[[Conversion], Sequence[Next]]) -> None:
    """The same for two outputs."""
    assert model.adapter is not None
    commands: list[Next] = []
    values: list[dict[str, Any]] = []
    for half in (model, model.adapter):
        if half.receipt is None:
            assert half.folder is not None
            sink.screen([report.wrote_line(str(half.out), half.checkpoint.config, None) + " (earlier)"])
            content = json.loads((half.folder / RECEIPT).read_bytes())
        else:
            sink.screen(written_lines(half, verbose=sink.verbose))
            commands += load_commands(half) if half is model else next_commands(half)[:1]
            content = dict(half.receipt.content)
        values.append({"out": half.out, "receipt": content, "earlier": half.receipt is None})
    sink.screen(report.next_lines(commands))
    seconds = sum(h.receipt.seconds for h in (model, model.adapter) if h.receipt is not None)
    more = {"notes": notes_json(model, model.adapter), "seconds": round(seconds, 3), "next": list(map(str, commands))}
    sink.json({**values[0], "adapter": values[1], **more})


def load_commands(written: Conversion) -> Sequence[Next]:
    """The check, then a line that loads the model; a value head is not part of the class that config.json names, which
    would load without it: there the line is the proof for the trainer that has it. A class that transformers lacks has
    no such line.
    """
    config: Mapping[str, Any] = written.checkpoint.config
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    out = as_argument(str(written.out))
    commands: list[Next] = [Command("inspect", (out,))]
    checkpoint = written.checkpoint
    if any(n.startswith("v_head.") for n in (*checkpoint.tensors, *(n for f in checkpoint.beside.values() for n in f))):
        commands.append(Command("verify", (out,)))
    elif name in class_names() and not config.get("auto_map"):
        path = as_loaders_take_it(str(written.out))
        loads = f"from transformers import {name} as M; print(M.from_pretrained({path!r}))"
        # Double quotes read better around Python's own, where nothing in the path means something to a shell.
        command = Command("", ("-c", loads), program="python")
        commands.append(f'python -c "{loads}"' if quoted(path) == path else command)
    return commands


def _pad_token(out: Path) -> str | None:
    """The pad token's text, from the tokenizer that was written; None where there is none."""
    try:
        config = load_json(out / TOKENIZER_CONFIG, limit=SMALL_FILE)
    except ConvertError:
        return None
    token = config.get("pad_token") if isinstance(config, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def source_lines() -> list[str]:
    """What was read of the Hub, and which files' digests are known."""
    from converter.core.files import sparse

    fetched = [f for f in sparse.known() if f.fetched]
    stored = [f for f in fetched if f.origin.mark is not None]
    lines = []
    if stored:
        text = f"{format_size(sum(f.fetched for f in stored))} of {len(stored)} objects, which are what they were"
        lines.append(line("from store", text))
    read = [f for f in fetched if f.origin.mark is None]
    if not read:
        return lines
    whole = [f for f in read if f.is_checked]
    part = [f.path.name for f in read if f.is_checked is None and not f.is_copied]
    text = f"{format_size(sum(f.fetched for f in read))} of {len(read)} files; {len(whole)} whole, equal in digest"
    if part:
        text += f"; read in part, so without a digest of the file: {fold([show(n) for n in part])}"
    return [*lines, line("from Hub", text)]
