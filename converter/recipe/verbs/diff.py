"""What `diff` does: two checkpoints compared by value, streamed, whatever the sharding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from converter.errors import ConvertError, Refused
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.open import opened

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.core.writer.reporter import Reporter
    from converter.examine.diff import Difference, Pair


@dataclass(frozen=True)
class Compared:
    """Two checkpoints, and what they do not share."""

    a: Checkpoint
    b: Checkpoint
    difference: Difference

    @property
    def is_equal(self) -> bool:
        """True where names, values, dtypes, config and side files are the same."""
        return self.difference.is_empty

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every tensor that both have, and how far they are apart."""
        return self.difference.pairs


def diff(
    a: str | Path,
    b: str | Path,
    *,
    ignore_prefix: Sequence[str] = (),
    optimizer: bool = False,
    allow_name: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Compared:
    """Compare two checkpoints by value: models, adapters, shards, single weight files.

    Args:
        a: a folder, a weight file, or a name on the Hub; `b` likewise.
        ignore_prefix: taken off names before they are paired.
        optimizer: compare Adam's moments of two training runs, whatever their ranks, and not the weights.
        allow_name: patterns of names of your own classes that pickled files may mention.
        reporter: hears of each tensor before it is read.

    Raises:
        UsageError: nothing that can be compared has that name, or an adapter is compared with a model.
        Refused: broken content, other than tensors that are lost.
    """
    from converter.core.writer.reporter import Silent
    from converter.examine.diff import compare

    told = reporter or Silent()
    prefixes = (ignore_prefix,) if isinstance(ignore_prefix, str) else tuple(ignore_prefix)
    with allowing(allow_name):
        read = _moments if optimizer else _open
        (one, lost, fault), (two, others, other_fault) = read(str(a)), read(str(b))
        told.start(one.total_bytes, 0)
        found = compare(one, two, ignore_prefixes=prefixes, told=lambda name, size: told.advance(size, name))
    return Compared(one, two, dataclasses.replace(found, lost=(lost, others), broken=(fault, other_fault)))


def _moments(text: str) -> tuple[Checkpoint, tuple[str, ...], str]:
    """Adam's moments of a run, whole, as a checkpoint of their own.

    Raises:
        UsageError, Refused: see `adam_moments`.
    """
    from converter.core.checkpoint import STATE, Checkpoint, Origin
    from converter.sources.moments import adam_moments

    kinds: tuple[Literal["exp_avg", "exp_avg_sq"], ...] = ("exp_avg", "exp_avg_sq")
    held = {f"{kind}/{name}": tensor for kind in kinds for name, tensor in adam_moments(text, which=kind).items()}
    path = Path(text).expanduser().resolve()
    origin = Origin(STATE, str(path), text, path.name, None, "", "Adam's moments")
    return Checkpoint(tensors=held, config={}, origin=origin), (), ""


def _open(text: str) -> tuple[Checkpoint, tuple[str, ...], str]:
    """A checkpoint as `opened` finds it, its tensors that are empty or in files that are gone, and why they are.

    Raises:
        UsageError, Refused: see `opened`; faults other than lost tensors.
    """
    from converter.sources.hf.broken import LOST
    from converter.sources.opening import input_spec, open_checkpoint

    try:
        return opened(text), (), ""
    except Refused as error:
        if error.code not in LOST:
            raise
        refusal = error
    try:
        spec = dataclasses.replace(input_spec(text), broken=True)
        found = open_checkpoint(spec, token=None, keep_code=False)
    except ConvertError:
        raise refusal from None
    lost = tuple(n for n, t in found.tensors.items() if t.info.shape == (0,))
    if len(lost) == len(found.tensors):
        raise refusal
    kept = {n: t for n, t in found.tensors.items() if n not in lost}
    return found.replace(tensors=kept, ties=(), beside={}), lost, f"{refusal.code}: {refusal.what}"
