"""What an adapter that states no task type was trained as, by the class that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TASK_SUFFIX = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
_REWARD_CLASS = re.compile(r"reward|critic|valuemodel|sequenceregression", re.IGNORECASE | re.ASCII)


def task_of_class(config: Mapping[str, Any]) -> str | None:
    """`SEQ_CLS` or `TOKEN_CLS` where the class that an adapter names is one with such a head."""
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    if not isinstance(name, str):
        return None
    named = next((task for task, suffix in TASK_SUFFIX.items() if name.endswith(suffix)), None)
    return named or ("SEQ_CLS" if _REWARD_CLASS.search(name) else None)
