"""From a path or a Hub name to a checkpoint, and from an adapter to the base that it records."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.checkpoint import TRAINING, Checkpoint
from converter.core.context import Context
from converter.core.files.names import MODEL_CONFIG
from converter.diagnostic import Again, Command
from converter.errors import ConvertError, Refused, UsageError
from converter.sources.finding import KeepsMasters, Source, kind_of, nothing_in, sources
from converter.sources.hub.names import as_base
from converter.sources.one_file import is_one, open_one
from converter.text import show

_SNAPSHOT = re.compile(
    r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{7,64})/?$", re.ASCII
)


@dataclass(frozen=True)
class InputSpec:
    """Where an input lies.

    Attributes:
        path: a folder or a Hub id; None where the user gives it with `--input NAME=PATH`.
        base_of: name of an adapter input; this one is the base model that the adapter records.
        revision: Hub commit, branch or tag.
        master: of a trainer's state, trained tensors as their fp32 masters.
        broken: keep tensors that are empty, cut or missing, for the step `fill`.
    """

    path: str | None = None
    base_of: str | None = None
    revision: str | None = None
    master: bool = False
    broken: bool = False

    def to_value(self) -> Any:
        """As it is written in YAML: the path alone where nothing else is said."""
        if self.base_of is None and self.revision is None and not self.master and not self.broken:
            return self.path
        named = {"path": self.path, "base-of": self.base_of, "revision": self.revision, "master": self.master or None}
        named["broken"] = self.broken or None
        return {k: v for k, v in named.items() if v is not None}


def open_checkpoint(
    spec: InputSpec, *, token: str | None, keep_code: bool, download: bool = True, config_alone: bool = False
) -> Checkpoint:
    """The checkpoint in a folder, in the Hub's cache or on the Hub.

    Args:
        config_alone: a model's config without any weights will do; it is a checkpoint without tensors.

    Raises:
        UsageError: nothing of that name, nothing that can be converted, or several checkpoints (`several-checkpoints`).
        Refused: broken content.
    """
    from converter.sources.locate import resolve

    assert spec.path is not None
    found = resolve(
        spec.path, revision=spec.revision, token=token, allow_download=download, in_parts=download,
        config_alone=config_alone,
    )  # fmt: skip
    if config_alone:
        from converter.sources.hf.config_alone import holds_config_alone, open_config

        if kind_of(found.path) == "hf" and holds_config_alone(found.path):
            return open_config(found.path, asked=spec.path, revision=found.revision, keep_code=keep_code)
    for source in sources().values():
        if source.detect(found.path):
            opens = _opener(source, spec)
            return opens(found.path, asked=spec.path, revision=found.revision, keep_code=keep_code)
    if found.path.is_file() and is_one(found.path):
        return open_one(found.path, asked=spec.path, revision=found.revision, keep_code=keep_code)
    raise nothing_in(found.path, spec.path)


def _opener(source: Source, spec: InputSpec) -> Callable[..., Checkpoint]:
    """How a source opens an input as its spec says."""
    if spec.broken and source.kind in ("model", "adapter"):
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
    """A folder that an adapter names is not a reason to look at what lies below it.

    Raises:
        Refused: it is not a model (`path-missing`).
    """
    from converter.sources.locate import resolve

    found = resolve(spec.path or "", revision=spec.revision, allow_download=False)
    if kind_of(found.path) is None:
        raise Refused("path-missing", f"{show(spec.path)} is not a model")


def open_recorded_base(adapter: Checkpoint, *, keep_code: bool, config_alone: bool = False) -> Checkpoint:
    """The base model that an adapter's config names: a local folder or an entry of the Hub's cache.

    Args:
        config_alone: see `open_checkpoint`.

    Raises:
        UsageError: it names none (`base-unknown`).
        Refused: what it names is not at hand (`base-not-found`); nothing is downloaded on an adapter's word.
    """
    spec = recorded_base(adapter)
    try:
        _expect_model(spec)
        return open_checkpoint(spec, token=None, keep_code=keep_code, download=False, config_alone=config_alone)
    except ConvertError as error:
        if error.code not in ("path-missing", "hub-not-cached"):
            raise
        at = f"@{show(spec.revision)}" if spec.revision else ""
        raise Refused(
            "base-not-found",
            f"the {_kind(adapter)} records {show(spec.path)}{at} as its base: "
            "neither a folder here nor in the Hub's cache",
            where=show(adapter.origin.asked),
            next=_with_base(adapter, as_base(spec.path, spec.revision)),
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
            f"the {_kind(adapter)} doesn't say which base model it was trained on (base_model_name_or_path is empty)",
            where=asked,
            next=_with_base(adapter, "BASE"),
        )
    revision = config.get("revision")
    name = beside_adapter(name, Path(adapter.origin.path), adapter.origin.asked)
    return InputSpec(name, revision=revision if isinstance(revision, str) and revision else None)


def _kind(adapter: Checkpoint) -> str:
    return "run" if adapter.origin.kind == TRAINING else "adapter"


def _with_base(adapter: Checkpoint, base: str) -> Again:
    """The user's command with a base."""
    verb = "gather" if adapter.origin.kind == TRAINING else "merge-lora"
    return Again(("--base", base), otherwise=Command(verb, (adapter.origin.asked, "OUT", "--base", base)))


def beside_adapter(name: str, folder: Path, asked: str) -> str:
    """A relative path that an adapter records: from here, else from the adapter's folder or one of three above.

    A training records the path from where it was started, which is above its `output_dir/checkpoint-500`.

    Args:
        folder: of the adapter.
        asked: the same, as the user typed it.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or name.startswith("~") or os.path.exists(path):
        return name
    for up in ("", "..", "../..", "../../.."):
        if os.path.isfile(folder / up / name / MODEL_CONFIG):  # a name that no file can have is none
            return os.path.normpath(os.path.join(asked, up, name))
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


def input_spec(text: str, revision: str | None = None) -> InputSpec:
    """The input that a user means by `./folder`, `owner/name` or `owner/name@revision`.

    Raises:
        UsageError: two revisions (`usage`).
    """
    name, at, suffix = text.rpartition("@")
    is_hub_id = at and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not os.path.lexists(text)
    if not is_hub_id:
        return InputSpec(text, revision=revision)
    if revision and revision != suffix:
        raise UsageError("usage", f"two revisions: {text} and --revision {revision}; give one")
    return InputSpec(name, revision=suffix)
