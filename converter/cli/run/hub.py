"""OUT on the Hub or in an object store, where a folder could be, and `--push-to-hub` after one was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from converter.cli.lines import checked_line, line, next_lines, update_lines
from converter.cli.options import Conversion as Flags
from converter.cli.run.planned import notes_json, source_lines
from converter.diagnostic import Command, Next, Steps, as_argument
from converter.errors import Refused
from converter.publish.outputs import SCHEME
from converter.sources.store_names import is_in_store
from converter.text import format_size, show

if TYPE_CHECKING:
    from converter.cli.sink import Sink
    from converter.core.writer.write import Receipt
    from converter.recipe.verbs.conversion import Conversion


def hub_lines(planned: Conversion) -> list[str]:
    """Where an output on the Hub goes."""
    where = planned.destination
    if where is None:
        is_stored = planned.out is not None and is_in_store(planned.out)
        return [line("to", f"{show(planned.out or '')}; one file at a time on this disk")] if is_stored else []
    how = "public" if where.public else "private, if it is new"
    return [line("to", f"{show(where.repo_id)} ({how}), as {show(planned.account)}; one file at a time on this disk")]


def finish_on_hub(written: Conversion, sink: Sink, commands: Sequence[Next]) -> None:
    """The screen's last lines of an output on the Hub."""
    done, plan = written.published, written.plan
    assert done is not None
    receipt, sent = done.receipt, len(done.pushed.sent) - len(done.copied)
    copied = f", {len(done.copied)} copied there from the source" if done.copied else ""
    sink.screen(
        [
            *_checked(done.receipt, verified=written.options.verify),
            *update_lines(receipt.measures, plan),
            *source_lines(),
            line("pushed", f"{done.pushed.url}  {max(sent, 0)} files sent{copied}"),
            *next_lines(commands),
        ]
    )
    sink.json(
        {
            "out": written.out,
            "url": done.pushed.url,
            "sent": list(done.pushed.sent),
            "copied": list(done.copied),
            "receipt": dict(receipt.content),
            "notes": notes_json(written),
            "seconds": round(receipt.seconds, 3),
            "next": list(map(str, commands)),
        }
    )


def finish_in_store(written: Conversion, sink: Sink) -> None:
    """The screen's last lines of an output in an object store; no loader reads one there, so that none is printed."""
    done, commands = written.stored, [Command("inspect", (as_argument(str(written.out)),))]
    assert done is not None
    sink.screen(
        [
            *_checked(done.receipt, verified=written.options.verify),
            *update_lines(done.receipt.measures, written.plan),
            *source_lines(),
            line("wrote", f"{show(str(done.place))}  {len(done.names)} objects, {format_size(done.bytes)}"),
            *next_lines(commands),
        ]
    )
    sink.json(
        {
            "out": written.out,
            "sent": list(done.names),
            "receipt": dict(done.receipt.content),
            "notes": notes_json(written),
            "seconds": round(done.receipt.seconds, 3),
            "next": list(map(str, commands)),
        }
    )


def _checked(receipt: Receipt, *, verified: bool) -> list[str]:
    """What was checked here; files that the Hub copied were never here."""
    if verified and not receipt.reread:
        return []
    return [checked_line(receipt.reread, receipt.recomputed, receipt.measures)]


def check_push(options: Flags) -> None:
    """Ask the Hub whether `--push-to-hub` will succeed, before the work is done.

    Raises:
        UsageError, Refused: see `converter.recipe.verbs.push.expect_writable`.
    """
    if options.push_to_hub is None or options.dry_run:
        return
    from converter.recipe.verbs.push import expect_writable

    expect_writable(options.push_to_hub, token=options.token)


def push_written(out: str, options: Flags) -> None:
    """Push what was written, as `rlhf-convert push` does; its JSON object is the conversion's to print."""
    if options.push_to_hub is None:
        return
    from converter.cli.options import Reading
    from converter.cli.run.push import push

    knobs = {
        "token": options.token,
        "public": options.public,
        "keep_code": options.keep_code,
        "allow": options.allow or (),
        "allow_name": options.allow_name or (),
    }
    shown = Reading(quiet=options.quiet or options.as_json, verbose=options.verbose)
    try:
        push(out, options.push_to_hub, shown, **knobs)
    except Refused as error:
        command = Command("push", (as_argument(out), options.push_to_hub))
        error.what += f"; {show(out)} is whole"
        error.next = Steps(error.next, "; then: ", command) if error.next else command
        raise


def with_command(error: Refused) -> Refused:
    """A refusal for space, with the way that needs little: the same command, its output elsewhere."""
    if error.code == "no-space":
        way = f"; or have OUT on the Hub ({SCHEME}...) or in a store (s3://...), which takes room for one file here"
        error.next = Steps(error.next or "free space", way)
    return error
