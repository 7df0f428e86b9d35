"""verl's FSDP checkpoints: each rank's `model_world_size_N_rank_R.pt`, gathered without verl, torch or a GPU.

Weights keep the dtype in which verl saved them (its own merger makes everything bf16). They are its masters too: under
FSDP the optimizer works on what is in these files. Names are those in memory; the converter `gather` makes a model or
an adapter of them.

Only names of files are looked at here; what reads shards is imported when a folder turns out to hold some.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.errors import UsageError
from converter.sources.base import Held, TrainingSource
from converter.sources.places import Place
from converter.sources.survey import file_names, folder_kind
from converter.sources.verl.files import find_part, holds_ranks, parts_in, rank_files, steps_in
from converter.text import show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.core.tensors.nodes import LazyTensor


class VerlSource(TrainingSource):
    """What verl's FSDPCheckpointManager wrote."""

    name = "verl"
    note_code = "verl-note"
    has_parts = True

    def detect(self, root: Path) -> str | None:
        """Why a folder is verl's, or None."""
        if holds_ranks(root):
            return "model files of verl's ranks are there"
        if folder_kind(file_names(root)) is not None:
            return None
        inside = [*parts_in(root), *steps_in(root)]
        return f"a checkpoint of verl is in {show(inside[-1].name)}" if inside else None

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The part's folder at or below `root`; see `find_part`."""
        return find_part(root, asked, tag=tag, part=part)

    def place(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place:
        """The same, or the error that nothing is there.

        Raises:
            UsageError: nothing (`no-shards`), or several to choose from (`several-checkpoints`, `several-parts`).
        """
        found = find_part(root, asked, tag=tag, part=part)
        if found is None:
            what = "there are no model files of verl's ranks here"
            expected = "a folder such as global_step_500/actor, global_step_500, or the run's folder"
            raise UsageError("no-shards", what, where=show(asked), expected=expected)
        return found

    def held(self, root: Path) -> Held:
        """Files and tensors of the part that is meant.

        Raises:
            UsageError: several steps or parts to choose from.
            Refused: files missing, of several runs or malformed, each named.
        """
        from converter.sources.verl.shards import Ranks
        from converter.sources.verl.weights import read_weights

        folder = self.place(root, show(root)).folder
        ranks = Ranks(rank_files(folder))
        found = read_weights(ranks)
        listed = [*ranks.files.models.values(), *ranks.files.optimizers.values()]
        return Held(folder, listed, found.tensors, [*ranks.files.said, *ranks.said])

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint, in the dtypes that are saved.

        Raises:
            UsageError: several steps or parts to choose from (`several-checkpoints`, `several-parts`).
            Refused: files missing, of several runs or malformed, each named; a placement that is not read.
        """
        return self.open_part(root, asked=asked, revision=revision, keep_code=keep_code)

    def open_masters(
        self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False
    ) -> Checkpoint:
        """The same: the optimizer works on these weights, and has no others."""
        return self.open_part(root, asked=asked, revision=revision, keep_code=keep_code, master=True)

    def open_part(
        self,
        root: Path,
        *,
        asked: str,
        revision: str | None = None,
        keep_code: bool = False,
        tag: str | None = None,
        part: str | None = None,
        master: bool = False,
    ) -> Checkpoint:
        """One part of one step as a checkpoint.

        Args:
            tag: the step's folder or number; None: what the run's tracker says, or the only one.
            part: `actor`, `critic`, ...; None: the only one.
            master: say where no weight is kept in fp32.
        """
        from converter.sources.verl.opening import open_chosen

        chosen = self.place(root, asked, tag=tag, part=part)
        return open_chosen(chosen, root, asked=asked, revision=revision, keep_code=keep_code, master=master)

    def adam_moments(
        self,
        root: Path,
        *,
        which: Literal["exp_avg", "exp_avg_sq"],
        tag: str | None = None,
        part: str | None = None,
        allow: Collection[str] = (),
    ) -> dict[str, LazyTensor]:
        """Adam's first or second moment of every trained parameter, by its name in memory.

        Args:
            allow: no refusal of these can be overruled.

        Raises:
            UsageError: no such step or part.
            Refused: files missing, of several runs or malformed; an optimizer whose parameters can't be told apart.
        """
        from converter.sources.verl.opening import moments_of

        return moments_of(self.place(root, show(root), tag=tag, part=part).folder, which)


SOURCE = VerlSource()
open_part = SOURCE.open_part
adam_moments = SOURCE.adam_moments
