"""Modules with factors inside a module that is saved whole, such as `dense` in RoBERTa's classifier.

PEFT before 0.14 makes a layer of them and copies it with the module: the trained copy is saved under the module's own
name, its factors once more under `modules_to_save`, and the frozen original's under `original_module`.

Source: `get_peft_model_state_dict`, https://github.com/huggingface/peft/blob/v0.12.0/src/peft/utils/save_and_load.py
"""

from __future__ import annotations

from dataclasses import replace

from converter.converters.merge.adapter_keys import AdapterModules
from converter.converters.merge.whole_tensors import is_same
from converter.core.context import Context
from converter.errors import Refused
from converter.families.words import SAVED_WHOLE
from converter.text import show

_FROZEN = "original_module"


def without_second_copies(read: AdapterModules, context: Context, where: str) -> tuple[AdapterModules, dict[str, str]]:
    """The modules with one set of factors each, and the keys that are left out, with the reason.

    Raises:
        Refused: the two copies of the trained factors differ (`adapter-key-twice`).
    """
    modules, dropped = dict(read.modules), dict[str, str]()
    for name, module in read.modules.items():
        pieces = name.split(".")
        word = next((w for w in (SAVED_WHOLE, _FROZEN) if w in pieces), None)
        own = read.modules.get(".".join(p for p in pieces if p != word))
        if word is None or own is None or not module.factors or module.factors.keys() != own.factors.keys():
            continue
        same = word == _FROZEN or all(is_same(context, t, own.factors[part]) for part, t in module.factors.items())
        if not same:
            what = "two sets of factors are of one module, and they differ"
            raise Refused("adapter-key-twice", what, where=where, got=show(name))
        reason = "the module as it was before training" if word == _FROZEN else f"identical with {show(own.name)}"
        dropped |= dict.fromkeys(module.keys, reason)
        del modules[name]
    return replace(read, modules=modules), dropped
