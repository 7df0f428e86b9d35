"""Megatron-core's checkpoints, gathered without Megatron, a process group or a GPU.

Tensors come by Megatron's names; the converter `gather`, which has the config, gives them those of transformers.
Only names of files are looked at here; what reads shards is imported when a folder turns out to hold some.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import UsageError
from converter.sources.base import Held, TrainingSource
from converter.sources.megatron.places import holds, search
from converter.sources.megatron_files import Kind, kind_here
from converter.sources.places import Place
from converter.sources.survey import file_names, folder_kind
from converter.text import show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.core.tensors.nodes import LazyTensor
    from converter.sources.megatron.weights import Moment

_WORDS: dict[Kind, str] = {
    "torch_dist": "a Megatron-core checkpoint is there",
    "other": "a Megatron-core checkpoint in a layout that is not read is there",
    "unfinished": "a Megatron-core checkpoint that was not finished is there",
    "legacy": "a checkpoint of Megatron's old format, with a file for each rank, is there",
}


class MegatronSource(TrainingSource):
    """What `megatron.core.dist_checkpointing.save` wrote, for whichever trainer."""

    name = "megatron"
    precedence = 11  # before `dcp`, whose files these are too
    has_parts = True
    note_code = "megatron-note"

    def detect(self, root: Path) -> str | None:
        """Why a folder is Megatron's, or None."""
        kind = kind_here(root)
        if kind is not None:
            return _WORDS[kind]
        if folder_kind(file_names(root)) is not None or not holds(root):
            return None
        return "a Megatron-core checkpoint is in a folder below"

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The checkpoint's folder at or below `root`; see `search`."""
        return search(root, asked, tag=tag, part=part)

    def held(self, root: Path) -> Held:
        """Files and tensors of the checkpoint that is meant.

        Raises:
            UsageError: several checkpoints to choose from (`several-checkpoints`, `several-parts`).
            Refused: files missing, cut short or malformed, each named; a layout that is not read.
        """
        from converter.sources.megatron.weights import held_in

        return held_in(_chosen(root, show(root)).folder)

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint in the dtypes that it was saved in.

        Raises:
            UsageError: several checkpoints to choose from.
            Refused: files missing, cut short or malformed, each named; a layout that is not read.
        """
        from converter.sources.megatron.weights import open_chosen

        place = _chosen(root, asked)
        return open_chosen(place, root, asked=asked, revision=revision, keep_code=keep_code, master=False)

    def open_masters(
        self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False
    ) -> Checkpoint:
        """The same, each weight as its fp32 master.

        Raises:
            Refused: they were not saved by name (`dcp-no-masters`), and see `open`.
        """
        from converter.sources.megatron.weights import open_chosen

        place = _chosen(root, asked)
        return open_chosen(place, root, asked=asked, revision=revision, keep_code=keep_code, master=True)

    def adam_moments(self, root: Path, *, which: Moment, allow: Collection[str] = ()) -> dict[str, LazyTensor]:
        """Adam's first or second moment by Megatron's names; nothing here can be overruled by `allow`.

        Raises:
            Refused: they were not saved by name (`dcp-no-moments`).
        """
        from converter.sources.megatron.weights import moments_of

        return moments_of(_chosen(root, show(root)).folder, which)


def _chosen(root: Path, asked: str) -> Place:
    """The folder that is meant.

    Raises:
        UsageError: nothing (`no-shards`), and see `search`.
    """
    found = search(root, asked)
    if found is None:
        raise UsageError(
            "no-shards",
            "there is no Megatron checkpoint here",
            where=show(asked),
            expected="a folder such as iter_0000010 or global_step_10/actor, or the run's folder",
        )
    return found


SOURCE = MegatronSource()
