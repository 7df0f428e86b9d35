"""Adapters that were saved alone: under the names that PEFT gives files, brought back to those in memory.

transformers' Trainer has accelerate save only the adapter of a PEFT model, through `get_peft_model_state_dict`, which
takes the adapter's name and `modules_to_save` out of the names. The optimizer's state keeps them.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/save_and_load.py (`get_peft_model_state_dict`)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path

from converter.errors import Refused
from converter.families.factors import alternatives
from converter.text import fold, show


@cache
def _saved() -> re.Pattern[str]:
    return re.compile(rf"(?P<module>.+\.(?:{alternatives()}))(?P<leaf>\.weight|\.bias)?", re.ASCII)


@cache
def _in_memory() -> re.Pattern[str]:
    return re.compile(rf".+\.(?:{alternatives()})\.(?P<adapter>[^.]+)(?:\.(?:weight|bias))?", re.ASCII)


def names_in_memory(names: Iterable[str], trained: Collection[str], folder: Path) -> dict[str, str] | None:
    """Names in memory by the names that an adapter was saved under; None where they are those in memory already.

    Args:
        trained: names in memory that the optimizer held; empty where that isn't known.

    Raises:
        Refused: tensors beside LoRA of which nothing says that they were trained (`dcp-adapter-names`).
    """
    given = list(names)
    saved = {n: m for n in given if (m := _saved().fullmatch(n)) is not None}
    if not saved:
        return None
    adapters = {
        m["adapter"] for n in trained if (m := _in_memory().fullmatch(n)) is not None and not _saved().fullmatch(n)
    }
    adapter = adapters.pop() if len(adapters) == 1 else "default"
    whole = {n.replace(f".modules_to_save.{adapter}.", "."): n for n in trained}
    found = {n: f"{m['module']}.{adapter}{m['leaf'] or ''}" for n, m in saved.items()}
    found |= {n: whole[n] for n in given if n not in saved and n in whole}
    unknown = [n for n in given if n not in found]
    if unknown:
        raise Refused(
            "dcp-adapter-names",
            f"an adapter was saved with {len(unknown)} tensors beside LoRA, and no optimizer's state says that they "
            f"were trained: {fold([show(n) for n in unknown])}",
            where=show(folder),
            next="put optimizer_0 back beside it, or take the adapter that the Trainer saved at the end",
        )
    return found
