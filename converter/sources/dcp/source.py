"""torch's distributed checkpoints, and what accelerate saves under FSDP, gathered without torch or a process group.

A folder with `.metadata` and `.distcp` files becomes a checkpoint whose tensors are stretches of those files, in the
dtype that they were saved in: FSDP keeps its parameters in fp32 where it trains in mixed precision, and so do we. Names
are those in memory; the converter `gather` makes a model or an adapter of them.

Reading metadata takes the pickle reader, which other folders' inspection does without: it is imported when needed.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from converter.core.checkpoint import Checkpoint
from converter.errors import UsageError
from converter.sources.base import Held, TrainingSource
from converter.sources.dcp.files import Kind, folders_in, kind_here, search
from converter.sources.places import Place
from converter.text import show

if TYPE_CHECKING:
    from converter.core.tensors.nodes import LazyTensor
    from converter.sources.dcp.layout import Moment

_WORDS: dict[Kind, str] = {
    "dcp": "a torch distributed checkpoint is there",
    "full": "accelerate saved the model under FSDP, in one file",
    "ranks": "the model is there as FSDP has it, one file a rank",
    "hf-shards": "torch saved the model as safetensors, in pieces",
    "rank-metadata": "a torch distributed checkpoint is there, with metadata for each rank",
    "no-metadata": "pieces of a torch distributed checkpoint are there",
}


class DcpSource(TrainingSource):
    """What `torch.distributed.checkpoint.save` wrote, by itself or through accelerate."""

    name = "dcp"
    has_parts = True

    def detect(self, root: Path) -> str | None:
        """Why a folder is of this source, or None."""
        kind = kind_here(root)
        if kind is not None:
            return _WORDS[kind]
        inside = folders_in(root)
        return f"a torch distributed checkpoint is in {show(inside[-1].name)}" if inside else None

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The checkpoint's folder at or below `root`; see `search`."""
        return search(root, asked, tag=tag, part=part)

    def held(self, root: Path) -> Held:
        """Files and tensors of the checkpoint that is meant.

        Raises:
            UsageError: several checkpoints to choose from (`several-checkpoints`).
            Refused: files missing, cut short or malformed, each named; a layout that is not read.
        """
        from converter.sources.dcp.weights import held_in

        return held_in(_chosen(root, show(root)).folder)

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint in the dtypes that it was saved in.

        Raises:
            UsageError: several checkpoints to choose from (`several-checkpoints`).
            Refused: files missing, cut short or malformed, each named; a layout that is not read.
        """
        from converter.sources.dcp.weights import open_chosen

        return open_chosen(_chosen(root, asked), root, asked=asked, revision=revision, keep_code=keep_code)

    def open_masters(
        self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False
    ) -> Checkpoint:
        """The same where trained parameters were saved in fp32.

        Raises:
            Refused: they were not (`dcp-no-masters`), and see `open`.
        """
        from converter.sources.dcp.weights import expect_masters

        return expect_masters(self.open(root, asked=asked, revision=revision, keep_code=keep_code))

    def adam_moments(self, root: Path, *, which: Moment, allow: Collection[str] = ()) -> dict[str, LazyTensor]:
        """Adam's first or second moment by parameter name; nothing here can be overruled by `allow`.

        Raises:
            Refused: see the function of this name.
        """
        return adam_moments(root, which=which)


def _chosen(root: Path, asked: str, tag: str | None = None, part: str | None = None) -> Place:
    """The folder that is meant.

    Raises:
        UsageError: nothing (`no-shards`), and see `search`.
    """
    found = search(root, asked, tag=tag, part=part)
    if found is None:
        raise UsageError(
            "no-shards",
            "there is no distributed checkpoint here",
            where=show(asked),
            expected="a folder with .metadata and *.distcp, accelerate's checkpoint-N, or the run's folder",
        )
    return found


def adam_moments(
    root: Path, *, which: Moment, tag: str | None = None, part: str | None = None
) -> dict[str, LazyTensor]:
    """Adam's first or second moment of every trained parameter, by its name in memory.

    Raises:
        UsageError: no such checkpoint.
        Refused: no optimizer was saved with the model, or not by names (`dcp-no-moments`); files missing or malformed.
    """
    from converter.sources.dcp.weights import moments_of

    return moments_of(_chosen(root, show(root), tag, part).folder, which)


SOURCE = DcpSource()
