"""What `converter.open` does: anything that holds tensors, as a mapping of lazy tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import ConvertError, UsageError
from converter.recipe.verbs.allowing import allowing
from converter.text import show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint

_HOLDS_OTHERS = ("several-checkpoints", "not-a-checkpoint", "weights-missing")


def open(
    source: str | Path, *, revision: str | None = None, token: str | None = None, allow_name: Sequence[str] = ()
) -> Checkpoint:
    """A model, an adapter, a trainer's shards or one weight file, as a mapping from names to lazy tensors.

    Reads headers only: of what lies on the Hub, a few kilobytes. Values are read by `converter.to_torch(found[name])`.

    Args:
        source: a folder, a weight file, `owner/name` or `hf://owner/name@revision`.
        revision: Hub commit, branch or tag.
        token: Hub token; None: as huggingface_hub finds it.
        allow_name: patterns of names of your own trainer's classes that pickled files may mention; none is imported.

    Raises:
        UsageError: nothing of that name, nothing that holds tensors, or several checkpoints (`several-checkpoints`).
        Refused: broken content.
    """
    with allowing(allow_name):
        return opened(str(source), revision=revision, token=token)


def opened(text: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """A checkpoint in a folder or on the Hub; one weight file; or the shards of a trainer in or below a folder.

    Raises:
        UsageError: nothing that holds tensors has that name.
        Refused: broken content.
    """
    from converter.sources.finding import find_place
    from converter.sources.hf.loose import open_file
    from converter.sources.opening import input_spec, open_checkpoint
    from converter.sources.survey import is_weight_file

    path = Path(text).expanduser()
    if is_weight_file(path.name) and path.is_file():
        return open_file(path, text)
    if path.is_file():
        raise UsageError("path-not-a-folder", "this is not a weight file; name the folder it is in", where=show(text))
    try:
        return open_checkpoint(input_spec(text, revision), token=token, keep_code=False)
    except ConvertError as error:
        if error.code not in _HOLDS_OTHERS or not path.is_dir():
            raise
        try:
            place = find_place(path, text)
        except ConvertError:
            raise error from None
    return open_checkpoint(input_spec(str(place.folder)), token=token, keep_code=False)
