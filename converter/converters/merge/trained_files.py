"""Weight files beside an adapter's own: what trainers saved whole, and files of which nobody knows what they are.

LLaVA's `non_lora_trainables.bin` holds every parameter that was trained without LoRA: the projector, sometimes a vision
tower. PEFT does not read it, and a merge without it is a model that nobody trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from converter.converters.merge.adapter_keys import SAVED, AdapterModules, Module, read_modules
from converter.converters.merge.carried_heads import TRL_FILE
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.families.words import HEAD_FILES
from converter.text import fold, show

_HEADS = frozenset({*HEAD_FILES, TRL_FILE, "regression_layer.pt", "gating_layer.pt"})


def trained_files(adapter: Checkpoint) -> dict[str, Mapping[str, LazyTensor]]:
    """The files beside an adapter that hold parts of the model, by name; heads are none of them."""
    return {name: tensors for name, tensors in adapter.beside.items() if name not in _HEADS}


def without_trained_files(adapter: Checkpoint) -> Checkpoint:
    """The adapter with nothing beside it but heads."""
    trained = trained_files(adapter)
    return adapter.replace(beside={n: t for n, t in adapter.beside.items() if n not in trained})


def with_trained_files(
    read: AdapterModules, files: Mapping[str, Mapping[str, LazyTensor]], where: str
) -> AdapterModules:
    """The adapter's modules with those that its files hold whole, as if they were in `modules_to_save`.

    Raises:
        Refused: a file holds LoRA factors (`adapter-files-unread`).
    """
    modules = dict(read.modules)
    for file, tensors in files.items():
        for name, module in read_modules(tensors, where).modules.items():
            if module.factors or module.token_rows is not None:
                raise unread_file(file, module.keys, where, "it holds an adapter of its own")
            known = modules.get(name) or Module(name)
            whole = {leaf: dict(held) for leaf, held in known.whole.items()}
            for leaf, tensor in module.replaced.items():
                held = whole.setdefault(leaf, {})
                key = f"{file}:{module.key(leaf)}"
                if SAVED in held:
                    raise unread_file(file, module.keys, where, "the adapter holds the same")
                held[SAVED] = (key, tensor)
            keys = [*known.keys, *(f"{file}:{key}" for key in module.keys)]
            modules[name] = Module(name, known.factors, whole, known.token_rows, known.rows_key, keys)
    return AdapterModules(modules, read.stripped, read.shared)


def expect_nothing_unread(adapter: Checkpoint, context: Context) -> dict[str, str]:
    """Refuse weight files of which nothing is known; those that hold what the adapter holds are copies.

    Returns:
        The copies, by file name, with the reason.

    Raises:
        Refused: a file that is not a copy, and `--allow adapter-files-unread` was not given.
    """
    copies: dict[str, str] = {}
    for file, tensors in adapter.unread.items():
        if all(n in adapter.tensors and _same(t, adapter.tensors[n], context) for n, t in tensors.items()):
            copies[file] = "a copy of the adapter's own tensors"
            continue
        context.consent(unread_file(file, list(tensors), show(adapter.origin.asked), "nothing says what they are of"))
    return copies


def _same(a: LazyTensor, b: LazyTensor, context: Context) -> bool:
    return a == b or (a.info == b.info and context.equal(a, b))


def unread_file(file: str, names: Collection[str], where: str, why: str) -> Refused:
    """The refusal of a weight file that would be left out."""
    return Refused(
        "adapter-files-unread",
        f"{show(file)} lies beside the adapter and is not merged: {fold(names)}; {why}",
        where=where,
        next=Steps(
            f"look at what {show(file)} is; if it is not part of the model, ",
            Again(("--allow", "adapter-files-unread"), otherwise=Command("merge-lora", (where, "OUT"))),
        ),
    )
