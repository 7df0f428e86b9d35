"""`adapter_config.json` of an adapter that is made here, as PEFT of every version since 0.6 reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from converter.families.implied import class_of
from converter.families.words import DECODER_CLASSES

PEFT_VERSION = "0.21.2"
"""The release whose layout of stacked experts is written; it says which side A is over where a matrix is square.

Source: `_did_swap_in_out_features`, https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
"""

_TASKS = (
    ("SEQ_CLS", ("ForSequenceClassification",)),
    ("TOKEN_CLS", ("ForTokenClassification",)),
    ("CAUSAL_LM", DECODER_CLASSES),
    ("QUESTION_ANS", ("ForQuestionAnswering",)),
)


def task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's word for the class that a config names; None for one that PEFT has no wrapper of its own for."""
    name = class_of(config) or ""
    found = next((task for task, ends in _TASKS if name.endswith(ends)), None)
    if found is None and name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return found


def target_modules(targets: Sequence[str], linear: Collection[str], modules: Collection[str]) -> list[str]:
    """PEFT's `target_modules`: last components where these match the targets and nothing else, else whole names."""
    known = {*linear, *modules}
    for module in modules:
        while "." in module:
            module = module.rpartition(".")[0]
            known.add(module)
    wanted = set(targets)
    last = sorted({t.rpartition(".")[2] for t in targets})
    matched = {n for n in known if n.rpartition(".")[2] in last}
    return last if matched == wanted else list(targets)


def lora_config(
    *,
    task: str | None,
    base: str,
    ranks: Mapping[str, int],
    targets: Sequence[str],
    saved: Sequence[str],
    bias: str,
    fan_in_fan_out: bool,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """A config of plain LoRA with the scale 1 for every module.

    Args:
        ranks: by module; those that are not the commonest are listed, with an alpha of their own.
        saved: modules that the adapter holds whole.
        model: the config of the model that it is for.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {m: r for m, r in ranks.items() if r != common}
    auto = {"base_model_class": class_of(model), "parent_library": "transformers"}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": auto if task is None and class_of(model) else None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(targets),
        "modules_to_save": list(saved) or None,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
