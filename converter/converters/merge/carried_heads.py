"""Value heads in files of their own, carried through a merge: LoRA does not touch them, so their bytes stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.files.names import MODEL_PICKLED
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.words import HEAD_FILES
from converter.text import fold, show

TRL_FILE = MODEL_PICKLED
"""Where TRL's wrapper saves the head beside an adapter; beside a whole model no loader looks there."""


Files = dict[str, Mapping[str, LazyTensor]]


def carried_files(base: Checkpoint, adapters: Sequence[Checkpoint], context: Context) -> tuple[Files, dict[str, str]]:
    """Files beside the merged model, and the tensors that were left out with the reason.

    An adapter's head takes the place of the base's: it is the one that was trained with it.

    Raises:
        Refused: two adapters bring a head (`adapters-conflict`), or one brings it twice (`head-twice`).
    """
    bringing = [a for a in adapters if a.beside]
    if len(bringing) > 1:
        listed = fold([show(a.origin.asked) for a in bringing])
        raise Refused("adapters-conflict", f"two adapters bring a value head of their own: {listed}; only one can")
    if not bringing:
        return dict(base.beside), {}
    brought = _named_for_a_model(bringing[0])
    text = f"the adapter's value head travels unchanged, in {fold(brought)}"
    context.note("info", "head-carried", text)
    replaced = {
        f for f in base.beside if f in brought or (f in HEAD_FILES and not brought.keys().isdisjoint(HEAD_FILES))
    }
    dropped = {f"{f}:{n}": "replaced by the adapter's own" for f in replaced for n in base.beside[f]}
    kept = {f: tensors for f, tensors in base.beside.items() if f not in replaced}
    return kept | brought, dropped


def _named_for_a_model(adapter: Checkpoint) -> Files:
    """The adapter's files, TRL's under the name that LLaMA-Factory reads beside a model: their tensors' names agree."""
    files: Files = {name: tensors for name, tensors in adapter.beside.items() if name != TRL_FILE}
    if TRL_FILE in adapter.beside:
        if not files.keys().isdisjoint(HEAD_FILES):
            raise Refused(
                "head-twice",
                f"there is a value head in {fold(f for f in files if f in HEAD_FILES)} and one in {TRL_FILE}",
                where=show(adapter.origin.asked),
                next="move the one away that is not this adapter's",
            )
        files[HEAD_FILES[0]] = adapter.beside[TRL_FILE]
    return files
