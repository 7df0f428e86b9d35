"""The keyword arguments that the verbs share: the flags of the command line in snake_case, with types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from converter.errors import UsageError
from converter.recipe.options import Going, LayoutChoice, WriteOptions
from converter.text import nearest, show

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from converter.core.writer.reporter import Reporter
    from converter.recipe.verbs.conversion import Conversion

Where = str | Path
"""A folder, or `owner/name` on the Hub."""


class Effort(TypedDict, total=False):
    """Keyword arguments that say how a plan is written, and not what.

    Each file is written in a worker of `executor`, any of `concurrent.futures.Executor`: threads, processes, or a
    cluster's whose machines share the file system. `jobs` and `memory` are then those of each worker.
    """

    jobs: int | None
    memory: str | int | None
    overwrite: bool
    resume: bool
    verify: bool
    reporter: Reporter | None
    executor: Executor | None


class Writing(Effort, total=False):
    """Keyword arguments of every function that writes a checkpoint: see `WriteOptions`, and how it goes on.

    `dry_run` checks and plans everything and writes nothing, as leaving `out` out does. `reporter` hears how far it is.
    `on_plan` is called once with the plan, before the first byte is written; what it raises stops the run. `told`
    hears, a line at a time, what takes long before the plan is there.
    """

    revision: str | None
    token: str | None
    dtype: str | None
    max_shard_size: str | int | None
    layout: str | None
    link_unchanged: bool
    allow: Sequence[str]
    allow_name: Sequence[str]
    keep_code: bool
    device: str
    public: bool
    dry_run: bool
    on_plan: Callable[[Conversion], None] | None
    told: Callable[[str], None] | None


class HeadWriting(Writing, total=False):
    """Keyword arguments of the functions that write a head beside those: see `HeadOptions`."""

    from_: str | None
    head: str | None
    base: Where | None
    weights_from: Sequence[Where]
    part: str | None
    tag: str | None
    lora_alpha: float | None
    dequantize: bool
    bias: str
    normaliser: str
    label: int | None
    label_weights: str | Sequence[float] | None
    init_head: str | None
    seed: int


_GOING = ("dry_run", "reporter", "on_plan", "executor", "told")

Options = TypeVar("Options", bound=WriteOptions)


def options_of(kind: type[Options], given: Mapping[str, Any]) -> tuple[Options, Going]:
    """The options that keyword arguments mean, and how the run goes on.

    Raises:
        UsageError: an unknown layout (`usage`).
        TypeError: an unknown keyword.
    """
    _expect_known(kind, given)
    values = {name: value for name, value in given.items() if value is not None}
    going = Going(**{n: values.pop(n) for n in _GOING if n in values})
    if "from_" in values:
        values["source"] = values.pop("from_")
    for name in ("allow", "allow_name", "weights_from"):
        if name in values:
            one = isinstance(values[name], str | Path)
            values[name] = (str(values[name]),) if one else tuple(map(str, values[name]))
    for name in ("max_shard_size", "memory", "base"):
        if name in values:
            values[name] = str(values[name])
    if "layout" in values:
        try:
            values["layout"] = LayoutChoice(values["layout"])
        except ValueError:
            known = ", ".join(LayoutChoice)
            raise UsageError("usage", f"no layout is named {show(str(values['layout']))}", expected=known) from None
    weights = values.get("label_weights")
    if weights is not None and not isinstance(weights, str):
        values["label_weights"] = ",".join(map(str, weights))
    return kind(**values), going


def _expect_known(kind: type[WriteOptions], given: Mapping[str, Any]) -> None:
    known = {"from_" if f.name == "source" else f.name for f in fields(kind)} | {*_GOING}
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        near = nearest(unknown, sorted(known), n=1)
        raise TypeError(f"unexpected keyword argument {unknown!r}{f'; did you mean {near[0]!r}?' if near else ''}")


def optional(where: Where | None) -> str | None:
    """A place as text; None where none is given."""
    return None if where is None else str(where)


def allowing(names: Sequence[str]) -> AbstractContextManager[object]:
    """While it is entered, pickled files may mention names that match one of the patterns.

    Raises:
        UsageError: a pattern is not one that is understood (`allow-name`).
    """
    if not names:
        return nullcontext()
    from converter.core.formats.pickle_names import allowing_names

    return allowing_names(names)
