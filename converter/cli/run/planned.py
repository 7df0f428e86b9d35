"""A recipe planned and written, for every verb that writes: what a screen needs to know of both."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.lines import line
from converter.cli.options import Conversion
from converter.cli.progress import progress
from converter.core.files.strict_json import load_json
from converter.diagnostic import Again, Command, Next, Steps, as_argument, quoted
from converter.errors import ConvertError, Interrupted, UsageError
from converter.publish.outputs import as_loaders_take_it
from converter.recipe.verbs.pieces import threads
from converter.text import fold, format_size, parse_size, show

if TYPE_CHECKING:
    from converter.core.writer.write import Receipt
    from converter.recipe.recipe import Recipe
    from converter.recipe.run import Prepared

SMALL_FILE = 4_000_000
"""Bytes of a tokenizer_config.json that are read for the name of the pad token."""


@dataclass(frozen=True)
class Written:
    """A finished conversion."""

    prepared: Prepared
    receipt: Receipt
    out: str

    def screen(self, *, verbose: bool = False) -> list[str]:
        """What was written, what was checked and what rounding cost."""
        from converter.cli import lines as report
        from converter.recipe.recipe import SOURCE

        receipt, plan = self.receipt, self.prepared.plan
        count = len(plan.written)
        pad = _pad_token(Path(self.out).expanduser())
        return [
            *([report.shards_line(count, count, plan.total_bytes, receipt.seconds)] if count else []),
            *report.linked_lines(plan, self.prepared.opened[SOURCE].origin.asked),
            report.checked_line(receipt.reread, receipt.recomputed, receipt.measures),
            *report.update_lines(receipt.measures, plan),
            *(report.by_projection(receipt.measures) if verbose else []),
            *source_lines(),
            report.wrote_line(self.out, self.prepared.checkpoint.config, pad),
        ]


def missing_output() -> UsageError:
    """The error of a writing verb without OUT."""
    what, expected = "the output is missing", "OUT as the last argument, or --out OUT"
    return UsageError("usage", what, expected=expected, next=Steps(Again(("--out", "./NEW_FOLDER")), ", or --dry-run"))


@dataclass(frozen=True)
class Planned:
    """What is known before the first byte, and what the options allow for the rest."""

    prepared: Prepared
    jobs: int
    memory: int | None


def plan_recipe(
    recipe: Recipe, target: Path | None, options: Conversion, *, input_lines: Callable[[Prepared], list[str]]
) -> Planned:
    """Plan, and show the plan; `target` is None where nothing will be written, or on the Hub."""
    from converter.cli import lines as report
    from converter.core.writer import preflight
    from converter.recipe.run import prepare

    sink = options.sink
    memory = None if options.memory is None else parse_size(options.memory, what="--memory")
    if target is not None:
        # Before any input is opened: a mistyped output shall not cost a download.
        preflight.check_target(target, (), overwrite=options.overwrite)
    prepared = prepare(recipe, allow=frozenset(options.allow or ()), token=options.token, keep_code=options.keep_code)
    plan, jobs = prepared.plan, options.jobs or threads()
    sink.screen(input_lines(prepared))
    sink.screen(report.note_lines(prepared.context.notes, verbose=options.verbose))
    adapters = [c for c in prepared.opened.values() if c.origin.kind == "adapter"]
    sink.screen([report.plan_line(plan, prepared.checkpoint, adapters)])
    free = None if target is None else preflight.free_bytes(target)
    needed = preflight.needed_memory(plan, jobs)
    sink.screen([report.needs_line(plan.total_bytes, free, needed)])
    return Planned(prepared, jobs, memory)


def notes_json(prepared: Prepared) -> list[dict[str, str]]:
    """A run's notes as JSON objects."""
    return [{"severity": n.severity, "code": n.code, "text": n.text} for n in prepared.context.notes]


def write_prepared(prepared: Prepared, out: Path, jobs: int, memory: int | None, options: Conversion) -> Receipt:
    """Write what was prepared.

    Raises:
        Interrupted: a signal came; nothing is published.
    """
    from converter.core.writer.write import write
    from converter.recipe.run import refuse_no_op

    try:
        with progress(options.sink) as reporter:
            return write(
                prepared.plan,
                out,
                jobs=jobs,
                memory=memory,
                overwrite=options.overwrite,
                resume=not options.no_resume,
                verify=not options.no_verify,
                reporter=reporter,
                accept=lambda measures: refuse_no_op(prepared, measures),
            )
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        raise Interrupted(number, f"interrupted, nothing published: {_kept(out)}") from None


def _kept(out: Path) -> str:
    partial = out.with_name(out.name + ".partial")
    if not partial.exists():
        return "the same command begins anew"
    return f"what is done is kept in {partial}; the same command again resumes it"


def load_commands(written: Written) -> Sequence[Next]:
    """The check, then a line that loads the model; a value head is no part of the class that config.json names, which
    would load without it: there the line is the proof for the trainer that has it.
    """
    config: Mapping[str, Any] = written.prepared.checkpoint.config
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    out = as_argument(written.out)
    commands: list[Next] = [Command("inspect", (out,))]
    checkpoint = written.prepared.checkpoint
    if any(n.startswith("v_head.") for n in (*checkpoint.tensors, *(n for f in checkpoint.beside.values() for n in f))):
        commands.append(Command("verify", (out,)))
    elif isinstance(name, str) and name.isidentifier():
        path = as_loaders_take_it(written.out)
        loads = f"from transformers import {name} as M; print(M.from_pretrained({path!r}))"
        # Double quotes read better around Python's own, where nothing in the path means something to a shell.
        command = Command("", ("-c", loads), program="python")
        commands.append(f'python -c "{loads}"' if quoted(path) == path else command)
    return commands


def _pad_token(out: Path) -> str | None:
    """The pad token's text, from the tokenizer that was written; None where there is none."""
    try:
        config = load_json(out / "tokenizer_config.json", limit=SMALL_FILE)
    except ConvertError:
        return None
    token = config.get("pad_token") if isinstance(config, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def source_lines() -> list[str]:
    """What was read of the Hub, and which files' digests are known."""
    from converter.core.files import sparse

    read = [f for f in sparse.known() if f.fetched]
    if not read:
        return []
    whole = [f for f in read if f.is_checked]
    part = [f.path.name for f in read if f.is_checked is None and not f.is_copied]
    text = f"{format_size(sum(f.fetched for f in read))} of {len(read)} files; {len(whole)} whole, equal in digest"
    if part:
        text += f"; read in part, so without a digest of the file: {fold([show(n) for n in part])}"
    return [line("from Hub", text)]
