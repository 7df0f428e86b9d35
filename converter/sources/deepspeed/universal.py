"""Universal DeepSpeed checkpoints, as ds_to_universal.py writes them: the model files, and a folder a parameter.

Weights in the training dtype: of stages 1 and 2 they are whole in the model file, of stage 3 they are the masters,
rounded once. Ranks' own files are preferred where both are there: see `search_universal`.
"""

from __future__ import annotations

from pathlib import Path

from converter.errors import UsageError
from converter.sources.deepspeed.files import UNIVERSAL, is_universal, search_universal, tags_in, universal_in
from converter.sources.deepspeed.source import DeepSpeedSource
from converter.sources.places import Place
from converter.sources.survey import file_names, folder_kind
from converter.text import show


class UniversalSource(DeepSpeedSource):
    """What ds_to_universal.py wrote."""

    name = "deepspeed_universal"

    def detect(self, root: Path) -> str | None:
        """Why a folder is a universal checkpoint, or None."""
        if is_universal(root):
            return f"a universal checkpoint of DeepSpeed: `{UNIVERSAL}` has a folder a parameter"
        if folder_kind(file_names(root)) is not None or tags_in(root):
            return None
        found = universal_in(root)
        return f"a universal checkpoint of DeepSpeed is in {show(found[-1].name)}" if found else None

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The universal checkpoint at or below `root`; see `search_universal`."""
        return search_universal(root, asked, tag)

    def place(self, root: Path, asked: str, tag: str | None = None) -> Place:
        """The same, or the error that nothing is there.

        Raises:
            UsageError: nothing (`no-shards`), or several to choose from (`several-checkpoints`).
        """
        found = search_universal(root, asked, tag)
        if found is None:
            raise UsageError("no-shards", "there is no universal checkpoint here", where=show(asked))
        return found


SOURCE = UniversalSource()
