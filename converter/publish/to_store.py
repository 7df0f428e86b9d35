"""A plan's output goes to an object store without being on the disk.

A store has no rename: objects appear one by one. The weights go first and the config last, without which no loader
takes the folder for a model; the receipt, which names every file, goes before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.files.names import ADAPTER_CONFIG, DELTA_CONFIG, MODEL_CONFIG, RECEIPT
from converter.core.writer.plan import Plan
from converter.core.writer.reporter import Reporter
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.stage import Stage
from converter.core.writer.write import Accept, Receipt
from converter.errors import Refused
from converter.publish.file_by_file import Knobs, Sender, Work, send_plan
from converter.publish.manifest import LocalFile
from converter.sources.store_names import StoreName
from converter.sources.stores.client import Store
from converter.text import fold, show


@dataclass(frozen=True)
class Stored:
    """A finished run; names of the objects below the folder, and their bytes together."""

    receipt: Receipt
    place: StoreName
    names: tuple[str, ...]
    bytes: int


def stage_of(place: StoreName) -> Path:
    """The name beside which the stage lies, in the current folder."""
    return Path("--".join(p for p in (place.scheme, place.bucket, *place.folder.split("/")) if p)[-200:])


def write_to_store(
    plan: Plan,
    store: Store,
    *,
    reporter: Reporter,
    jobs: int = 1,
    memory: int | None = None,
    resume: bool = True,
    verify: bool = True,
    accept: Accept | None = None,
) -> Stored:
    """Write a plan's output below a folder of a bucket, with room here for one of its files.

    Raises:
        Refused: the disk, the memory, an input or the store does not allow it, or the folder has objects that this run
            did not send (`output-exists`).
        VerificationFailed: what was written is not what it should be.
        Interrupted: a signal came; the same command goes on.
    """

    def start(work: Work, kept: Mapping[str, Any]) -> _StoreSender:
        found = {o.name: o.mark for o in store.objects()}
        _expect_ours(plan, store, set(found), is_resumed=bool(kept))
        return _StoreSender(work, store, found)

    def finish(sender: _StoreSender, _content: Mapping[str, Any], beside: list[LocalFile]) -> tuple[str, ...]:
        for file in sorted(beside, key=_turn):
            assert file.content is not None
            store.put(file.name, file.content)
        sizes = {s.file: s.size for s in plan.shards} | {f.name: f.size for f in beside}
        there = {o.name: o.size for o in store.objects()}
        if there != sizes:
            differs = fold([show(n) for n in sorted(sizes.keys() | there.keys()) if sizes.get(n) != there.get(n)])
            what = f"what lies in the store is not what was sent; something else writes there: {differs}"
            raise Refused(
                "store-write", what, where=str(store.place), next="choose a folder that nothing else writes to"
            )
        return tuple(sizes)

    knobs = Knobs(stage_of(store.place), str(store.place), reporter, jobs, memory, resume, verify, accept)
    receipt, _, names = send_plan(plan, knobs, start, finish)
    total = sum(o.size for o in store.objects())
    return Stored(receipt, store.place, names, total)


def expect_empty(store: Store, *, resume: bool) -> None:
    """Refuse a folder with objects, but where an earlier run may have sent them; its journal is compared later.

    Raises:
        Refused: objects lie there (`output-exists`), or the store can't be read (`store-read`).
    """
    found = [o.name for o in store.objects()]
    if found and not (resume and Stage(stage_of(store.place).absolute()).folder.is_dir()):
        raise _exists(store, found)


def _turn(file: LocalFile) -> int:
    """What makes a model of the folder comes last."""
    order = (RECEIPT, DELTA_CONFIG, ADAPTER_CONFIG, MODEL_CONFIG)
    if file.name in order:
        return 2 + order.index(file.name)
    return 1 if file.name.endswith((".index.json", ".metadata")) else 0


def _expect_ours(plan: Plan, store: Store, found: set[str], *, is_resumed: bool) -> None:
    """Refuse a folder with objects of another run (`output-exists`)."""
    names = {s.file for s in plan.shards} | plan.side_files.keys() | {RECEIPT}
    foreign = found - names if is_resumed else found
    if foreign:
        raise _exists(store, foreign)


def _exists(store: Store, names: Iterable[str]) -> Refused:
    listed = sorted(names)
    return Refused(
        "output-exists",
        f"{len(listed)} objects lie there already: {fold([show(n) for n in listed])}",
        where=str(store.place),
        next="choose another folder, or remove the objects yourself",
    )


class _StoreSender(Sender):
    """Sends one file after another; `found` is what stands for the state of each object that was there before."""

    def __init__(self, work: Work, store: Store, found: Mapping[str, str]) -> None:
        super().__init__(work)
        self._store, self._found = store, found

    def is_there(self, shard: ShardPlan, line: Mapping[str, Any]) -> bool:
        """Whether the object is the one that an earlier run sent."""
        return "mark" in line and self._found.get(shard.file) == line["mark"]

    def bring(self, shard: ShardPlan, line: Mapping[str, Any], path: Path) -> None:
        """Send a file."""
        mark = self._store.put(shard.file, path)
        self.work.stage.record({**line, "mark": mark})
        self.lines[shard.file] = line
