"""Opens a recipe's inputs, applies its steps and plans the output. No tensor is read but what a converter asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.checkpoint import ADAPTER, TRAINING, Checkpoint
from converter.core.context import Context
from converter.core.files import sparse
from converter.core.formats.pickle_names import CODE as NAMES
from converter.core.formats.pickle_names import allowed_names
from converter.core.formats.safetensors_io import Header, read_header
from converter.core.writer.accounting import unaccounted
from converter.core.writer.plan import Plan, make_plan
from converter.errors import ConvertError, Refused, UsageError
from converter.plugins import KeepsMasters, Source, kind_of, nothing_in, sources
from converter.recipe.fields import check, instantiate
from converter.recipe.recipe import SOURCE, InputSpec, Recipe
from converter.sources.hub.names import as_base
from converter.text import fold, show
from converter.version import __version__

_SNAPSHOT = re.compile(
    r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{7,64})/?$", re.ASCII
)


@dataclass(frozen=True)
class Prepared:
    """All that is known before the first byte is written.

    Attributes:
        opened: the inputs by name.
        recorded: names of inputs that were not given but recorded in an adapter.
        checkpoint: what came out of the last step.
    """

    recipe: Recipe
    opened: Mapping[str, Checkpoint]
    recorded: frozenset[str]
    checkpoint: Checkpoint
    plan: Plan
    context: Context


def prepare(recipe: Recipe, *, allow: frozenset[str], token: str | None = None, keep_code: bool = False) -> Prepared:
    """Everything up to the plan: check the recipe, open its inputs, apply its steps, lay the output out.

    Raises:
        UsageError: the recipe or an input's path is wrong.
        Refused: an input is broken, a converter refuses, or an input tensor would be lost (`unaccounted`).
    """
    check(recipe)
    context = Context(allow)
    opened = open_inputs(recipe, token=token, keep_code=keep_code)
    if (allowed := allowed_names()) is not None and allowed.used:
        context.consents[NAMES] = f"names that pickled files mention, read as data: {fold(sorted(allowed.used))}"
    recorded = frozenset(n for n, s in recipe.inputs.items() if s.base_of is not None)
    for name, other in opened.items():
        is_over_base = other.origin.kind == ADAPTER and opened[SOURCE].origin.kind != ADAPTER
        if name != SOURCE and is_over_base and SOURCE not in recorded:
            compare_base(opened[SOURCE], other, context)
    checkpoint = opened[SOURCE]
    for converter in instantiate(recipe, opened):
        checkpoint = converter(checkpoint, context)
    if checkpoint.origin.kind == TRAINING:
        raise Refused(
            "not-a-model",
            "a trainer's state has to be gathered before it is a model",
            where=show(checkpoint.origin.asked),
            next=f"rlhf-convert gather {show(checkpoint.origin.asked)} OUT",
        )
    checkpoint = checkpoint.replace(checks=tuple(c for each in opened.values() for c in each.checks))
    sparse.expect_all_read()
    if lost := unaccounted(list(opened.values()), checkpoint):
        raise Refused("unaccounted", f"tensors of the inputs would be lost: {lost}")
    output = recipe.output
    if output.link_unchanged and (output.layout == "pack" or output.max_shard_size is not None):
        what = "files that are linked stay as they are, and a size or the layout `pack` lays them out anew"
        raise UsageError("link-layout", what, where=recipe.file, next="leave --max-shard-size and --layout pack out")
    plan = make_plan(
        checkpoint,
        context=context,
        max_shard_size=recipe.output.max_shard_size,
        layout=recipe.output.layout,
        provenance=_provenance(recipe, opened, checkpoint.repaired),
        linkable=_linkable(checkpoint) if output.link_unchanged else None,
    )
    return Prepared(recipe, opened, recorded, checkpoint, plan, context)


def _linkable(checkpoint: Checkpoint) -> dict[str, Header]:
    """Headers of the input files that links may be made to.

    Raises:
        UsageError: they are on the Hub, and gone when the run ends (`link-remote`).
    """
    files = [path for path in checkpoint.inputs if path.endswith(".safetensors")]
    if any(sparse.at(path) is not None for path in files):
        what = "files that are read from the Hub are not here to be linked to"
        raise UsageError("link-remote", what, next=f"hf download {show(checkpoint.origin.name)}, then the same command")
    return {path: read_header(Path(path)) for path in files}


def refuse_no_op(prepared: Prepared, measures: Mapping[str, Mapping[str, float]]) -> None:
    """Stop a merge whose result is the base, bit by bit: nobody asks for that.

    Raises:
        Refused: no tensor changed, none came from an adapter, and `--allow no-op` was not given (`no-op`).
    """
    adapters = {c.origin.path for c in prepared.opened.values() if c.origin.kind == ADAPTER}
    merged = [m for m in measures.values() if "effective" in m]
    # A product of the change with itself is zero only where every value is what it was; NaN is no zero.
    if not adapters or not merged or any(m["effective"] != 0 for m in merged):
        return
    copied = (run.file for e in prepared.plan.entries if e.runs is not None for run in e.runs)
    if not any(str(Path(file).parent) in adapters for file in copied):
        prepared.context.consent(
            Refused(
                "no-op", f"none of {len(merged)} merged tensors differs from the base: the update is lost in rounding"
            )
        )


def open_inputs(recipe: Recipe, *, token: str | None, keep_code: bool) -> dict[str, Checkpoint]:
    """Every input as a checkpoint; those that an adapter records come after the adapters."""
    opened: dict[str, Checkpoint] = {}
    for name, spec in sorted(recipe.inputs.items(), key=lambda item: item[1].base_of is not None):
        if spec.base_of is None:
            opened[name] = open_checkpoint(spec, token=token, keep_code=keep_code)
        else:
            if spec.base_of not in opened:
                what = f"`{show(name)}` is the base of `{show(spec.base_of)}`, which is a base itself"
                raise UsageError("recipe", what, where=recipe.file, expected="the name of an adapter's input")
            opened[name] = open_recorded_base(opened[spec.base_of], keep_code=keep_code)
    return {name: opened[name] for name in recipe.inputs}


def open_checkpoint(spec: InputSpec, *, token: str | None, keep_code: bool, download: bool = True) -> Checkpoint:
    """The checkpoint in a folder, in the Hub's cache or on the Hub.

    Raises:
        UsageError: nothing of that name, nothing that can be converted, or several checkpoints (`several-checkpoints`).
        Refused: broken content.
    """
    from converter.sources.locate import resolve

    assert spec.path is not None
    found = resolve(spec.path, revision=spec.revision, token=token, allow_download=download, in_parts=download)
    for source in sources().values():
        if source.detect(found.path):
            opens = _opener(source, spec)
            return opens(found.path, asked=spec.path, revision=found.revision, keep_code=keep_code)
    raise nothing_in(found.path, spec.path)


def _opener(source: Source, spec: InputSpec) -> Callable[..., Checkpoint]:
    """How a source opens an input as its spec says."""
    if spec.broken and source.name in ("hf", "peft"):
        from converter.sources.hf.broken import open_broken

        return open_broken
    return _masters_of(source, str(spec.path)) if spec.master else source.open


def _masters_of(source: Source, asked: str) -> Callable[..., Checkpoint]:
    """How a source opens a checkpoint with fp32 masters.

    Raises:
        UsageError: its checkpoints have none (`no-masters`).
    """
    if not isinstance(source, KeepsMasters):
        what = "there are no fp32 masters here: they are in a trainer's state"
        raise UsageError("no-masters", what, where=show(asked))
    return source.open_masters


def _expect_model(spec: InputSpec) -> None:
    """A folder that an adapter names is no reason to look at what lies below it.

    Raises:
        Refused: it is no model (`path-missing`).
    """
    from converter.sources.locate import resolve

    found = resolve(spec.path or "", revision=spec.revision, allow_download=False)
    if kind_of(found.path) is None:
        raise Refused("path-missing", f"{show(spec.path)} is no model")


def open_recorded_base(adapter: Checkpoint, *, keep_code: bool) -> Checkpoint:
    """The base model that an adapter's config names: a local folder or an entry of the Hub's cache.

    Raises:
        UsageError: it names none (`base-unknown`).
        Refused: what it names is not at hand (`base-not-found`); nothing is downloaded on an adapter's word.
    """
    spec = recorded_base(adapter)
    try:
        _expect_model(spec)
        return open_checkpoint(spec, token=None, keep_code=keep_code, download=False)
    except ConvertError as error:
        if error.code not in ("path-missing", "hub-not-cached"):
            raise
        at = f"@{show(spec.revision)}" if spec.revision else ""
        raise Refused(
            "base-not-found",
            f"the adapter records {show(spec.path)}{at} as its base: neither a folder here nor in the Hub's cache",
            where=show(adapter.origin.asked),
            next=f"rlhf-convert merge-lora {show(adapter.origin.asked)} OUT --base {as_base(spec.path, spec.revision)}",
        ) from None


def recorded_base(adapter: Checkpoint) -> InputSpec:
    """What an adapter's config says of its base.

    Raises:
        UsageError: it names none (`base-unknown`).
    """
    asked = show(adapter.origin.asked)
    config = adapter.config
    if adapter.origin.kind == TRAINING:
        from converter.core.side_files import recorded

        config = recorded(adapter.side_files) or {}
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UsageError(
            "base-unknown",
            "the adapter doesn't say which base model it was trained on (base_model_name_or_path is empty)",
            where=asked,
            next=f"rlhf-convert merge-lora {asked} OUT --base BASE",
        )
    revision = config.get("revision")
    name = _beside_adapter(name, adapter)
    return InputSpec(name, revision=revision if isinstance(revision, str) and revision else None)


def _beside_adapter(name: str, adapter: Checkpoint) -> str:
    """A relative path that an adapter records: from here, else from the adapter's folder or the one above."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or name.startswith("~") or path.exists():
        return name
    for up in ("", ".."):
        found = Path(adapter.origin.path) / up / name
        if (found / "config.json").is_file():
            return os.path.normpath(os.path.join(adapter.origin.asked, up, name))
    return name


def compare_base(base: Checkpoint, adapter: Checkpoint, context: Context) -> None:
    """Tell the user where the base given is not the one that the adapter records: same shapes, other numbers."""
    name = adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return
    revision = adapter.config.get("revision")
    if snapshot := _SNAPSHOT.search(name):
        name, revision = f"{snapshot['owner']}/{snapshot['name']}", snapshot["revision"]
    given = base.origin
    if _last(name) not in {_last(given.name), _last(given.asked), _last(given.path)}:
        text = f"the adapter was trained on {show(_public(name))}, the base given is {show(given.name)}"
        context.note("changes-numbers", "base-differs", text)
    elif isinstance(revision, str) and revision and given.revision and not _same_commit(revision, given.revision):
        text = (
            f"the adapter was trained on revision {show(revision)} of its base, the one given is {show(given.revision)}"
        )
        context.note("changes-numbers", "base-revision-differs", text)


def _last(name: str) -> str:
    """Last part of a path or Hub id: folders are moved and mirrored, so only this is comparable."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _public(name: str) -> str:
    """A Hub id as it is; of a path only the last part: the receipt holds no path of the machine that trained."""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if is_hub_id else name.rstrip("/").rpartition("/")[2]


def _same_commit(a: str, b: str) -> bool:
    """Branches can't be told from each other without the Hub; only two commits can differ."""
    commits = all(re.fullmatch(r"[0-9a-f]{7,64}", r) for r in (a, b))
    return not commits or a.startswith(b) or b.startswith(a)


def _provenance(recipe: Recipe, opened: Mapping[str, Checkpoint], repaired: Mapping[str, str]) -> dict[str, Any]:
    """What the receipt says of a run's origin: names, revisions and digests, no path of this machine."""
    inputs = {
        name: {
            "kind": c.origin.kind,
            "name": c.origin.name,
            "revision": c.origin.revision,
            "header_digest": c.origin.header_digest,
        }
        for name, c in opened.items()
    }
    made = {"steps": recipe.steps_to_value(), "output": recipe.output_to_value()}
    told = {"repaired": dict(repaired)} if repaired else {}
    return {"version": __version__, "recipe": made, "inputs": inputs, **told}
