"""What verl records of LoRA beside its shards: rank and alpha, in `lora_train_meta.json`.

Source: `_get_lora_train_meta` in
https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/checkpoint/fsdp_checkpoint_manager.py, and in
https://github.com/volcengine/verl/blob/v0.9.1/verl/trainer/sft_trainer.py, which writes alpha 0 where it was not set
(PEFT then took its own default). The merger of versions without this file writes `lora_alpha: 0` into every adapter. So
0 is unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from converter.core.checkpoint import SideFile
from converter.core.context import Context
from converter.core.files.strict_json import load_json
from converter.errors import Refused
from converter.text import show

LORA_META = "lora_train_meta.json"


def recorded_alpha(files: Mapping[str, SideFile], ranks: Collection[int], where: str, context: Context) -> float | None:
    """The alpha that the file records; None where there is no file, or it says 0.

    Raises:
        Refused: it is of LoRA with another rank than the tensors (`adapter-rank`).
    """
    file = files.get(LORA_META)
    value = None if file is None or file.source is None else load_json(Path(file.source))
    if not isinstance(value, dict):
        return None
    rank, alpha = value.get("r"), value.get("lora_alpha")
    if type(rank) is int and rank > 0 and rank not in ranks:
        raise Refused(
            "adapter-rank",
            f"the {LORA_META} by the shards is not of this run",
            where=where,
            expected=f"r = {rank}",
            got=f"r = {', '.join(map(str, sorted(set(ranks))))} in the tensors",
            next="remove it, or put the right one there",
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        return None
    context.note("info", "found", f"lora_alpha = {show(alpha)} as {LORA_META} records")
    return float(alpha)
