"""DeepSpeed checkpoints: ZeRO stages 0 to 3 and BF16_Optimizer, gathered without DeepSpeed, torch or a GPU.

A tag's folder becomes a checkpoint whose tensors are stretches of the ranks' files. In the training dtype by default:
stages 0 to 2 store such weights whole, and byte for byte they are copied; in stage 3 they are the fp32 masters, rounded
once, which is how DeepSpeed makes the live ones. Names are those in memory; the converter `gather` makes a model or an
adapter of them.

Only names of files are looked at here; what reads shards is imported when a folder turns out to hold some.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.errors import Refused, UsageError
from converter.sources.base import Held, TrainingSource
from converter.sources.deepspeed.files import find_tag, holds_ranks, search_tag, tags_in
from converter.sources.deepspeed.parts import find_in_part, parts_in
from converter.sources.places import Place, no_parts
from converter.sources.survey import Fault, Survey, file_names, folder_kind
from converter.text import show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.core.tensors.nodes import LazyTensor


class DeepSpeedSource(TrainingSource):
    """What DeepSpeed's `save_checkpoint` wrote."""

    name = "deepspeed"
    note_code = "zero-note"
    has_parts = True

    def detect(self, root: Path) -> str | None:
        """Why a folder is DeepSpeed's, or None."""
        if holds_ranks(root):
            return "shards of DeepSpeed are there"
        if folder_kind(file_names(root)) is not None:
            return None
        tags = tags_in(root)
        if tags:
            return f"shards of DeepSpeed are in {show(tags[-1].name)}"
        parts = parts_in(root)
        return f"checkpoints of OpenRLHF's {' and '.join(parts)}, by DeepSpeed, are in it" if parts else None

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The tag's folder at or below `root`, in one of a run's models where there are several; see `search_tag`."""
        parts = parts_in(root)
        if parts and not tags_in(root):
            return find_in_part(parts, asked, tag=tag, part=part)
        found = search_tag(root, asked, tag)
        if found is not None and part is not None:
            raise no_parts(self.name, asked, part)
        return found

    def place(self, root: Path, asked: str, tag: str | None = None) -> Place:
        """The same, or the error that nothing is there.

        Raises:
            UsageError: nothing (`no-shards`), or several to choose from (`several-checkpoints`).
        """
        parts = parts_in(root)
        found = find_in_part(parts, asked, tag=tag, part=None) if parts and not tags_in(root) else None
        return found or find_tag(root, asked, tag)

    def survey_quickly(self, root: Path) -> Survey:
        """The same of many ranks by reading the first one's files, and of the others their directories and sizes."""
        from converter.sources.deepspeed.quick_survey import survey_of_first
        from converter.sources.deepspeed.state import read_shards

        try:
            shards = read_shards(self.place(root, show(root)).folder)
            quick = survey_of_first(shards, root)
        except (Refused, UsageError):
            return self.survey(root)
        if quick is None:
            return self.survey(root)
        quick.faults += [
            Fault(code="zero-note", severity="cosmetic", text=text, where=show(root)) for text in shards.said
        ]
        return quick

    def held(self, root: Path) -> Held:
        """Files and tensors of the tag that is meant.

        Raises:
            UsageError: several tags to choose from (`several-checkpoints`).
            Refused: files missing, mixed or malformed, each named.
        """
        from converter.sources.deepspeed.whole import read_whole

        tag = self.place(root, show(root))
        whole = read_whole(tag.folder)
        return Held(tag.folder, whole.shards.names, whole.weights.tensors, list(dict.fromkeys(whole.shards.said)))

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint in the training dtype.

        Raises:
            UsageError: several tags to choose from (`several-checkpoints`).
            Refused: files missing, mixed or malformed, each named; a layout that is not read.
        """
        return self.open_tag(root, asked=asked, revision=revision, keep_code=keep_code)

    def open_masters(
        self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False
    ) -> Checkpoint:
        """The same with trained parameters as fp32 masters."""
        return self.open_tag(root, asked=asked, revision=revision, keep_code=keep_code, master=True)

    def open_tag(
        self,
        root: Path,
        *,
        asked: str,
        revision: str | None = None,
        keep_code: bool = False,
        tag: str | None = None,
        master: bool = False,
    ) -> Checkpoint:
        """A tag as a checkpoint.

        Args:
            tag: the folder's name; None: what `latest` says, or the only one.
            master: trained parameters as fp32 masters.
        """
        from converter.sources.deepspeed.whole import open_chosen

        chosen = self.place(root, asked, tag)
        return open_chosen(chosen, root, asked=asked, revision=revision, keep_code=keep_code, master=master)

    def adam_moments(
        self,
        root: Path,
        *,
        which: Literal["exp_avg", "exp_avg_sq"],
        tag: str | None = None,
        allow: Collection[str] = (),
    ) -> dict[str, LazyTensor]:
        """Adam's first or second moment of every trained parameter, by its name in memory.

        Args:
            allow: `moments-order`: without ZeRO, take it that the optimizer got its parameters in the model's order.

        Raises:
            UsageError: no such tag.
            Refused: another optimizer; files missing, mixed or malformed; stage 0 with an order that nothing proves.
        """
        from converter.sources.deepspeed.whole import states_of

        return states_of(self.place(root, show(root), tag).folder, which, allow)


SOURCE = DeepSpeedSource()
open_tag = SOURCE.open_tag
adam_moments = SOURCE.adam_moments
