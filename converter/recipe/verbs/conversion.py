"""A recipe planned and written, for every verb that writes: to a folder, or file by file to the Hub or a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from converter.errors import UsageError
from converter.publish.outputs import SCHEME, STALE, goes_to_hub, is_remote
from converter.recipe.options import Going, WriteOptions
from converter.recipe.verbs.pieces import threads
from converter.text import parse_size, show

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from converter.core.checkpoint import Checkpoint
    from converter.core.context import Note
    from converter.core.writer.plan import Plan
    from converter.core.writer.reporter import Reporter
    from converter.core.writer.tasks import Task
    from converter.core.writer.write import Accept, Receipt
    from converter.publish.requests import Destination
    from converter.publish.to_hub import Published
    from converter.publish.to_store import Stored
    from converter.recipe.recipe import Recipe
    from converter.recipe.run import Prepared


SUFFIX = "-adapter"
"""Of two outputs, the second one's folder is the first one's with this."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a verb that writes has planned, and once it has written, its receipt.

    Attributes:
        prepared: all that is known before the first byte: the inputs, the checkpoint, the plan.
        options: what was asked of the output.
        out: where it goes; None where nothing was to be written.
        receipt: what the run did; None before it is written, and after a dry run.
        published: where the output is on the Hub: what was sent.
        stored: where it is in an object store: what was sent.
        destination: the repository that it goes to, and `account` whose it is.
        adapter: of two outputs the other one, in `OUT-adapter`.
        earlier: an earlier run wrote it, and it was compared with the plan.
        task: which share of it this process wrote; `receipt` is then that of the one process that ended the run.
    """

    prepared: Prepared
    options: WriteOptions
    out: str | None = None
    receipt: Receipt | None = None
    published: Published | None = None
    stored: Stored | None = None
    destination: Destination | None = None
    account: str = ""
    adapter: Conversion | None = None
    earlier: bool = False
    task: Task | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe that the arguments meant; `recipe.to_yaml()` is what `rlhf-convert run` takes."""
        return self.prepared.recipe

    @property
    def plan(self) -> Plan:
        """Every file that is or would be written."""
        return self.prepared.plan

    @property
    def checkpoint(self) -> Checkpoint:
        """What the output holds, as a mapping of lazy tensors over the inputs."""
        return self.prepared.checkpoint

    @property
    def notes(self) -> tuple[Note, ...]:
        """What a user should know of this run."""
        return tuple(self.prepared.context.notes)

    @property
    def folder(self) -> Path | None:
        """The folder that the output goes to; None where there is none, or it is on the Hub or in a store."""
        return None if self.out is None or is_remote(self.out) else Path(self.out).expanduser()

    @property
    def memory(self) -> int | None:
        """Bytes that the run may hold; None: what the machine has free."""
        return memory_of(self.options)

    @property
    def jobs(self) -> int:
        """Threads."""
        return self.options.jobs or threads()


C = TypeVar("C", bound=Conversion)

EXECUTOR = "executor="


def memory_of(options: WriteOptions) -> int | None:
    """Bytes that a run may hold.

    Raises:
        UsageError: not a size (`usage`).
    """
    return None if options.memory is None else parse_size(options.memory, what="--memory")


def convert_recipe(
    recipe: Recipe,
    out: str | None,
    options: WriteOptions,
    going: Going,
    made: Callable[[Prepared], C],
    task: Task | None = None,
) -> C:
    """Plan a recipe and write it; only planned where there is no `out`, and in a dry run.

    Args:
        made: the result, of what was prepared.
        task: write this share of the files; whoever is last ends the run.

    Raises:
        UsageError, Refused, VerificationFailed: see `prepare`, `write` and `write_to_hub`.
    """
    if out is not None and is_remote(out) and not going.dry_run:
        if goes_to_hub(out):
            return _convert_to_hub(recipe, out, options, going, made)
        return _convert_to_store(recipe, out, options, going, made)
    target = None if out is None or is_remote(out) else Path(out).expanduser()
    memory_of(options)
    if target is not None:
        from converter.core.writer.preflight import check_target

        # Before any input is opened: a mistyped output shall not cost a download.
        if task is None:  # else another task may have made it
            check_target(target, (), overwrite=options.overwrite)
    planned = dataclasses.replace(made(prepared_of(recipe, options, going.told)), out=out)
    if going.on_plan is not None:
        going.on_plan(planned)
    if out is None or going.dry_run:
        _expect_room(planned)
        return planned
    if task is not None:
        return dataclasses.replace(planned, receipt=_write_task(planned, going, task), task=task)
    return dataclasses.replace(planned, receipt=write_folder(planned, going))


def _write_task(planned: Conversion, going: Going, task: Task) -> Receipt | None:
    from converter.core.writer.reporter import Silent
    from converter.core.writer.tasks import write_task
    from converter.recipe.run import look_at_values

    assert planned.folder is not None
    _expect_folders(planned.plan, "--task")
    options = planned.options
    return write_task(
        planned.plan, planned.folder, task, reporter=going.reporter or Silent(), jobs=planned.jobs,
        memory=planned.memory, overwrite=options.overwrite, resume=options.resume, verify=options.verify,
        accept=lambda measures: look_at_values(planned.prepared, measures),
    )  # fmt: skip


def prepared_of(recipe: Recipe, options: WriteOptions, told: Callable[[str], None] | None = None) -> Prepared:
    """The recipe's inputs opened, its steps applied, its output laid out."""
    from converter.recipe.run import prepare

    allow = frozenset(options.allow)
    return prepare(
        recipe, allow=allow, token=options.token, keep_code=options.keep_code, device=options.device, told=told
    )


def _expect_room(planned: Conversion) -> None:
    """The refusals that a real run would make before its first byte."""
    from converter.core.writer import preflight

    preflight.memory_limit(planned.plan, planned.memory)
    if planned.folder is not None:
        preflight.check_target(planned.folder, planned.plan.inputs, overwrite=planned.options.overwrite)
        preflight.check_space(planned.plan, planned.folder)


def write_folder(planned: Conversion, going: Going) -> Receipt:
    """Write what was planned into its folder."""
    from converter.recipe.run import look_at_values

    assert planned.folder is not None
    return write_plan(
        planned.plan, planned.folder, planned.options, going,
        accept=lambda measures: look_at_values(planned.prepared, measures),
    )  # fmt: skip


def write_plan(
    plan: Plan, out: Path | str | None, options: WriteOptions, going: Going, accept: Accept | None = None
) -> Receipt:
    """Write a plan into a folder.

    Raises:
        UsageError: no folder is named (`usage`).
    """
    from converter.core.writer.reporter import Silent
    from converter.core.writer.write import write

    if out is None or is_remote(str(out)):
        raise _no_folder()
    if going.executor is not None:
        return _write_with(going.executor, plan, Path(out).expanduser(), options, going, accept)
    return write(
        plan,
        Path(out).expanduser(),
        jobs=options.jobs or threads(),
        memory=memory_of(options),
        overwrite=options.overwrite,
        resume=options.resume,
        verify=options.verify,
        reporter=going.reporter or Silent(),
        accept=accept,
    )


def _write_with(
    executor: Executor, plan: Plan, out: Path, options: WriteOptions, going: Going, accept: Accept | None
) -> Receipt:
    from converter.core.writer.reporter import Silent
    from converter.core.writer.tasks import write_with

    _expect_folders(plan, EXECUTOR)
    jobs = options.jobs or getattr(executor, "default_jobs", None) or threads()
    return write_with(
        executor, plan, out, reporter=going.reporter or Silent(), jobs=jobs, memory=memory_of(options),
        overwrite=options.overwrite, resume=options.resume, verify=options.verify, accept=accept,
    )  # fmt: skip


def _expect_folders(plan: Plan, wish: str) -> None:
    """Refuse inputs of which other processes have no bytes, and a device that they may not have.

    Raises:
        UsageError: one comes from the Hub in parts, or a device computes (`usage`).
    """
    from converter.core.files import sparse

    if plan.device is not None and wish == EXECUTOR:
        raise UsageError("usage", f"{wish} computes on its workers' CPUs; leave the device out")

    if any(sparse.at(path) for path in plan.inputs):
        raise UsageError("usage", f"{wish} reads folders, which every process sees; download the input first")


def _no_folder() -> UsageError:
    return UsageError("usage", "a plan is written to a folder", expected="write(planned, out)")


def write_planned(planned: C, out: str | None, reporter: Reporter | None, executor: Executor | None) -> C:
    """Write a plan to a folder; of two outputs both.

    Raises:
        UsageError: no folder is named (`usage`).
    """
    from converter.core.writer.preflight import check_target

    named = out or planned.out
    if named is None or is_remote(named):
        raise _no_folder()
    going = Going(reporter=reporter, executor=executor)
    planned = dataclasses.replace(planned, out=named)
    if planned.adapter is not None:
        second = dataclasses.replace(planned.adapter, out=named.rstrip("/") + SUFFIX)
        for each in (planned, second):
            if each.folder is not None and not each.earlier:
                check_target(each.folder, each.plan.inputs, overwrite=each.options.overwrite)
        receipt = planned.receipt if planned.earlier else write_folder(planned, going)
        second = dataclasses.replace(second, receipt=write_folder(second, going))
        return dataclasses.replace(planned, receipt=receipt, adapter=second)
    return dataclasses.replace(planned, receipt=write_folder(planned, going))


# The Hub


def _destination(out: str, options: WriteOptions) -> Destination:
    """The repository that `hf://owner/name[@branch]` names.

    Raises:
        UsageError: no repository of that form (`hub-repo-id`).
    """
    from converter.publish.requests import Destination
    from converter.sources.locate import hub_name

    named = hub_name(out)
    assert named is not None
    if named.folder:
        what = f"{show(out)} is a folder in a repository; an output is the whole of one"
        raise UsageError("hub-repo-id", what, expected=f"{SCHEME}owner/name or {SCHEME}owner/name@branch")
    name, branch, _ = named
    message = f"Upload {name.rpartition('/')[2]} with rlhf-convert"
    removes = STALE in options.allow
    return Destination(name, options.token, options.public, branch or "main", message=message, removes_stale=removes)


def _convert_to_hub(recipe: Recipe, out: str, options: WriteOptions, going: Going, made: Callable[[Prepared], C]) -> C:
    """A recipe whose output goes to the Hub file by file, with room for one of them."""
    from converter.publish.push import check_destination
    from converter.publish.to_hub import write_to_hub

    where = _destination(out, options)
    if going.executor is not None:
        raise UsageError("usage", "executor= writes to a folder that its workers share, not to the Hub")
    if recipe.output.link_unchanged:
        raise UsageError("link-remote", "the Hub has no links; leave --link-unchanged out", where=show(out))
    # Before any input is opened: a token that can't write shall not cost a conversion.
    account = check_destination(where)
    memory_of(options)
    planned = made(prepared_of(recipe, options, going.told))
    planned = dataclasses.replace(planned, out=out, destination=where, account=account)
    if going.on_plan is not None:
        going.on_plan(planned)
    done = write_to_hub(
        planned.plan,
        where,
        card=lambda receipt, existing: _card(planned.prepared, where, receipt, existing),
        **_sending(planned, going),
    )
    return dataclasses.replace(planned, receipt=done.receipt, published=done)


def _convert_to_store(
    recipe: Recipe, out: str, options: WriteOptions, going: Going, made: Callable[[Prepared], C]
) -> C:
    """A recipe whose output goes to an object store file by file, with room for one of them."""
    from converter.publish.to_store import expect_empty, write_to_store
    from converter.sources.store_names import store_name
    from converter.sources.stores.client import Store

    place = store_name(out)
    assert place is not None
    if going.executor is not None:
        raise UsageError("usage", "executor= writes to a folder that its workers share, not to an object store")
    if recipe.output.link_unchanged:
        raise UsageError("link-remote", "an object store has no links; leave --link-unchanged out", where=show(out))
    if options.overwrite:
        what = "an object store has no rename, so that nothing in it is replaced whole; leave --overwrite out"
        raise UsageError("usage", what, where=show(out), expected="a folder with no objects")
    memory_of(options)
    # Before any input is opened: credentials that open nothing shall not cost a conversion.
    store = Store(place)
    expect_empty(store, resume=options.resume)
    planned = dataclasses.replace(made(prepared_of(recipe, options, going.told)), out=out)
    if going.on_plan is not None:
        going.on_plan(planned)
    done = write_to_store(planned.plan, store, **_sending(planned, going))
    return dataclasses.replace(planned, receipt=done.receipt, stored=done)


def _sending(planned: Conversion, going: Going) -> dict[str, Any]:
    """How files are written and sent, as was asked."""
    from converter.core.writer.reporter import Silent
    from converter.recipe.run import look_at_values

    return {
        "reporter": going.reporter or Silent(), "jobs": planned.jobs, "memory": planned.memory,
        "resume": planned.options.resume, "verify": planned.options.verify,
        "accept": lambda measures: look_at_values(planned.prepared, measures),
    }  # fmt: skip


def _card(prepared: Prepared, where: Destination, receipt: Mapping[str, Any], existing: str) -> str:
    from converter.publish.card import CardFacts, base_models, model_card
    from converter.publish.push import licence_of

    checkpoint = prepared.checkpoint
    is_adapter = checkpoint.origin.kind == "adapter"
    facts = CardFacts(where.repo_id, receipt, checkpoint.config, is_adapter, prepared.plan.total_bytes)
    if bases := base_models(facts):
        facts = dataclasses.replace(facts, licence=licence_of(bases[0], where.token))
    return model_card(facts, existing)
