"""What programs read of a LoRA adapter: names, layouts and fields that each of them takes, and what it takes none of.

Sources: vLLM's `PEFTHelper`, https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/lora/peft_helper.py; PEFT 0.13's
`LoraConfig`, https://github.com/huggingface/peft/blob/v0.13.2/src/peft/tuners/lora/config.py (a field that it does not
have is a TypeError there); mlx-lm's `load_adapters`, https://github.com/ml-explore/mlx-lm/blob/v0.28.0/mlx_lm/tuner/utils.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from converter.errors import UsageError
from converter.text import show

_PEFT = re.compile(r"peft@0\.(\d+)(?:\.\d+)?", re.ASCII)
_NEWEST_OLD = 16
"""PEFT 0.16 and older have no `target_parameters`."""

OLD_FIELDS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save",
        "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip
"""Fields of PEFT 0.13's LoraConfig that an adapter which is written here may set."""


@dataclass(frozen=True)
class Layout:
    """What a program takes.

    Attributes:
        name: what `--for` calls it.
        one_rank: a single rank and a single scale for all modules.
        whole: tensors beside the factors: whole modules, biases, rows of tokens.
        fields: of the config; None: all of PEFT's.
        outside: modules outside of the layers may have factors: embeddings, heads.
        is_mlx: mlx-lm's files.
        is_tinker: Tinker's names and stacks.
    """

    name: str
    one_rank: bool = False
    whole: bool = True
    fields: frozenset[str] | None = None
    outside: bool = True
    is_mlx: bool = False
    is_tinker: bool = False


LAYOUTS = {
    "peft": Layout("peft"),
    "transformers@4": Layout("transformers@4"),
    "vllm": Layout("vllm", one_rank=True, whole=False, fields=OLD_FIELDS),
    "mlx": Layout("mlx", one_rank=True, whole=False, outside=False, is_mlx=True),
    "tinker": Layout("tinker", one_rank=True, whole=False, fields=OLD_FIELDS, is_tinker=True),
}


def find_layout(asked: str) -> Layout:
    """The layout that `--for` names.

    Raises:
        UsageError: none has that name (`usage`).
    """
    found = LAYOUTS.get(asked)
    if found is not None:
        return found
    release = _PEFT.fullmatch(asked)
    if release is not None and 6 <= int(release[1]) <= _NEWEST_OLD:
        return Layout(asked, fields=OLD_FIELDS)
    known = f"{', '.join(LAYOUTS)}, peft@0.6 to peft@0.{_NEWEST_OLD}"
    raise UsageError("usage", "--for names no layout of adapters", expected=known, got=show(asked))
