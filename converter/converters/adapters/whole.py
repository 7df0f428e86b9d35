"""Whether an adapter is what PEFT would load of it: every pair whole, of the config's rank, where the config looks.

PEFT itself says nothing of a tensor that it has no place for, and draws a factor that is missing.
"""

from __future__ import annotations

from converter.converters.adapters.pairs import read_pairs
from converter.converters.merge.asked_modules import is_target
from converter.converters.merge.foreign_adapters import plain_names
from converter.converters.merge.methods.finding import find_method
from converter.converters.merge.methods.lora import METHOD
from converter.core.checkpoint import ADAPTER, Checkpoint
from converter.errors import Refused
from converter.text import fold, show


def expect_loadable(adapter: Checkpoint) -> None:
    """Refuse an adapter of plain LoRA of which PEFT would pass over a part.

    Raises:
        Refused: a pair is not whole, or of another rank than the config's (`adapter-incomplete`, `adapter-rank`), or
            the config does not target its module (`adapter-untargeted`).
    """
    if adapter.origin.kind != ADAPTER or adapter.config.get("peft_type") != METHOD.peft_type:
        return
    if find_method(adapter.config, show(adapter.origin.asked)) is not METHOD:
        return
    if adapter.config.get("init_lora_weights") in ("pissa", "olora"):
        return
    held, _ = plain_names(adapter.tensors, show(adapter.origin.asked))
    found = read_pairs(adapter.replace(tensors=held))
    bare = bool(adapter.config.get("target_parameters"))
    lost = [p.module for p in found.pairs if not is_target(p.module, adapter.config) and not bare]
    if lost:
        raise Refused(
            "adapter-untargeted",
            f"adapter_config.json does not target {fold(lost)}: PEFT would pass over their factors",
            where=show(adapter.origin.asked),
        )
