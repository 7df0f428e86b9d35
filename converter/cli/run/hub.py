"""OUT on the Hub: `hf://owner/name` where a folder could be, and `--push-to-hub` after one was written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converter.cli.lines import checked_line, line, next_lines, update_lines
from converter.cli.options import Conversion
from converter.cli.progress import progress
from converter.cli.run.planned import source_lines
from converter.diagnostic import Command, Next, Steps, as_argument
from converter.errors import Refused, UsageError
from converter.publish.outputs import SCHEME, STALE, repository
from converter.sources.hub.secrets import words_without_token
from converter.text import show

if TYPE_CHECKING:
    from converter.cli.run.planned import Written
    from converter.publish.requests import Destination
    from converter.publish.write import Published
    from converter.recipe.recipe import Recipe
    from converter.recipe.run import Prepared


def destination(out: str, options: Conversion) -> Destination:
    """The repository that `hf://owner/name[@branch]` names.

    Raises:
        UsageError: no repository of that form (`hub-repo-id`), or `--push-to-hub` beside it (`usage`).
    """
    from converter.publish.requests import Destination
    from converter.sources.locate import hub_name

    named = hub_name(out)
    assert named is not None
    if named.folder:
        what = f"{show(out)} is a folder in a repository; an output is the whole of one"
        raise UsageError("hub-repo-id", what, expected=f"{SCHEME}owner/name or {SCHEME}owner/name@branch")
    if options.push_to_hub is not None:
        raise UsageError("usage", f"{show(out)} is on the Hub already; leave --push-to-hub out")
    name, branch, _ = named
    message = f"Upload {name.rpartition('/')[2]} with rlhf-convert"
    removes = STALE in (options.allow or ())
    return Destination(name, options.token, options.public, branch or "main", message=message, removes_stale=removes)


def convert_to_hub(
    recipe: Recipe,
    out: str,
    options: Conversion,
    *,
    input_lines: Callable[[Prepared], list[str]],
    next_commands: Callable[[Written], Sequence[Next]],
) -> int:
    """Run a recipe whose output goes to the Hub file by file, with room for one of them."""
    from converter.cli.run.planned import Written, notes_json, plan_recipe
    from converter.publish.push import check_destination
    from converter.publish.write import write_to_hub
    from converter.recipe.run import refuse_no_op

    where = destination(out, options)
    if recipe.output.link_unchanged:
        raise UsageError("link-remote", "the Hub has no links; leave --link-unchanged out", where=show(out))
    sink = options.sink
    # Before any input is opened: a token that can't write shall not cost a conversion.
    me = check_destination(where)
    planned = plan_recipe(recipe, None, options, input_lines=input_lines)
    prepared, plan = planned.prepared, planned.prepared.plan
    how = "public" if where.public else "private, if it is new"
    sink.screen([line("to", f"{show(where.repo_id)} ({how}), as {show(me)}; one file at a time on this disk")])
    with progress(sink) as reporter:
        done = write_to_hub(
            plan,
            where,
            reporter=reporter,
            card=lambda receipt, existing: _card(prepared, where, receipt, existing),
            jobs=planned.jobs,
            memory=planned.memory,
            resume=not options.no_resume,
            verify=not options.no_verify,
            accept=lambda measures: refuse_no_op(prepared, measures),
        )
    receipt, sent = done.receipt, len(done.pushed.sent) - len(done.copied)
    copied = f", {len(done.copied)} copied there from the source" if done.copied else ""
    commands = list(next_commands(Written(prepared, receipt, out)))
    sink.screen(
        [
            *_checked(done, verified=not options.no_verify),
            *update_lines(receipt.measures, plan),
            *source_lines(),
            line("pushed", f"{done.pushed.url}  {max(sent, 0)} files sent{copied}"),
            *next_lines(commands),
        ]
    )
    sink.json(
        {
            "out": out,
            "url": done.pushed.url,
            "sent": list(done.pushed.sent),
            "copied": list(done.copied),
            "receipt": dict(receipt.content),
            "notes": notes_json(prepared),
            "seconds": round(receipt.seconds, 3),
            "next": list(map(str, commands)),
        }
    )
    return 0


def _checked(done: Published, *, verified: bool) -> list[str]:
    """What was checked here; files that the Hub copied were never here."""
    if verified and not done.receipt.reread:
        return []
    return [checked_line(done.receipt.reread, done.receipt.recomputed, done.receipt.measures)]


def _card(prepared: Prepared, where: Destination, receipt: Mapping[str, Any], existing: str) -> str:
    from converter.publish.card import CardFacts, base_models, model_card
    from converter.publish.push import licence_of

    checkpoint = prepared.checkpoint
    is_adapter = checkpoint.origin.kind == "adapter"
    facts = CardFacts(where.repo_id, receipt, checkpoint.config, is_adapter, prepared.plan.total_bytes)
    if bases := base_models(facts):
        facts = dataclasses.replace(facts, licence=licence_of(bases[0], where.token))
    return model_card(facts, existing)


def check_push(options: Conversion) -> None:
    """Ask the Hub whether `--push-to-hub` will succeed, before the work is done.

    Raises:
        UsageError, Refused: see `converter.publish.push.check_destination`.
    """
    if options.push_to_hub is None or options.dry_run:
        return
    from converter.publish.push import check_destination
    from converter.publish.requests import Destination

    repo_id, branch = repository(options.push_to_hub, "main")
    check_destination(Destination(repo_id, options.token, revision=branch))


def push_written(out: str, options: Conversion) -> None:
    """Push what was written, as `rlhf-convert push` does; its JSON object is the conversion's to print."""
    if options.push_to_hub is None:
        return
    from converter.cli.options import Reading
    from converter.cli.run.push import PushRequest, push

    asked = PushRequest(
        out,
        options.push_to_hub,
        token=options.token,
        public=options.public,
        keep_code=options.keep_code,
        allow=tuple(options.allow or ()),
    )
    shown = Reading(quiet=options.quiet or options.as_json, verbose=options.verbose)
    try:
        push(asked, shown)
    except Refused as error:
        command = Command("push", (as_argument(out), options.push_to_hub))
        error.what += f"; {show(out)} is whole"
        error.next = Steps(error.next, "; then: ", command) if error.next else command
        raise


def with_command(error: Refused, out: str) -> Refused:
    """A refusal for space, with the command that needs none: the same one, its output on the Hub."""
    if error.code == "no-space":
        words = [f"{SCHEME}OWNER/NAME" if w == out else w for w in words_without_token(sys.argv[1:])]
        is_whole = out in sys.argv and bool(words)
        command: Next = Command(words[0], tuple(words[1:])) if is_whole else f"{SCHEME}OWNER/NAME as OUT"
        way = "; or write it to the Hub, one file at a time: "
        error.next = Steps(error.next or "free space", way, command)
    return error
