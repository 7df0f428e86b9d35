"""`adapter_config.json` as the merge understands it: every field is neutral, implemented or refused by name.

Source of the fields: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.core.checkpoint import Checkpoint
from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.text import show

_NEUTRAL = frozenset(
    {
        "_name_or_path",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_dtype",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "transformers_version",
    }
)
"""Fields that say how the adapter was trained; the tensors present and the base's own layers say the rest.

`lora_dtype` and LoRA+'s learning rates are written by ms-swift 2:
https://github.com/modelscope/ms-swift/blob/v2.6.1/swift/tuners/peft.py (`LoraConfig`).
"""

_IMPLEMENTED = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "r",
        "rank_pattern",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)

_REFUSED_FIELDS = {
    "alora_invocation_tokens": "activated LoRA switches on at certain tokens and can't be merged",
    "arrow_config": "Arrow routes between adapters at run time and can't be merged",
    "kasa_config": "KaSA truncates the base weight, which this version does not rebuild",
    "layer_replication": "layer replication is not implemented",
    "lora_ga_config": "LoRA-GA moves the base by gradients that no file holds",
    "megatron_config": "Megatron's parallel layers are not implemented",
    "monteclora_config": "MonteCLoRA is not implemented",
    "target_parameters": "LoRA on bare parameters (fused experts) is not implemented",
    "use_bdlora": "block-diagonal LoRA is not implemented",
    "use_qalora": "QA-LoRA belongs to a quantised base",
    "velora_config": "VeLoRA is not implemented",
}

_NOT_MERGEABLE = {
    "ADAPTION_PROMPT": "it adds prompts inside attention",
    "CARTRIDGE": "it is a trained key-value cache",
    "CPT": "it is a trained prompt",
    "LILY": "its update depends on the input",
    "MULTITASK_PROMPT_TUNING": "it is a trained prompt",
    "POLY": "it mixes adapters by task at run time",
    "PREFIX_TUNING": "it is a trained prompt",
    "PROMPT_TUNING": "it is a trained prompt",
    "P_TUNING": "it is a trained prompt",
    "SHADOW": "its update depends on the input",
    "XLORA": "it mixes adapters by input at run time",
}

_HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica", "true", "false"})

_LOST_INITS = {
    "corda": "the base was moved by covariances of the training data",
    "lora_ga": "the base was moved by gradients of the training data",
    "loftq": "the adapter belongs to a quantised base",
}

MAX_PATTERNS = 20_000
MAX_PATTERN_LENGTH = 400


@dataclass(frozen=True)
class AdapterConfig:
    """What a merge needs of a LoRA config.

    Attributes:
        r, alpha: defaults; `rank_of` and `alpha_of` apply the patterns.
        init: `plain`, `mica`, `pissa` or `olora`.
        bias: `none`, `all` or `lora_only`.
        token_indices: rows that were trained, per embedding module name; the key `""` stands for the input embedding.
    """

    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    init: str
    modules_to_save: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    token_indices: Mapping[str, tuple[int, ...]]
    task_type: str | None
    ensure_weight_tying: bool

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in memory."""
        return self.rank_pattern.get(_first_match(self.rank_pattern, module) or "", self.r)

    def scale_of(self, module: str) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` with rank-stabilised LoRA."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, module) or "", self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _first_match(patterns: Mapping[str, Any], module: str) -> str | None:
    """PEFT's rule: a key is a regex that starts at the front or after a dot and matches to the end; the first wins.

    Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/other.py (`get_pattern_key`)
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def read_adapter_config(adapter: Checkpoint, *, base_is_residual: bool = False) -> AdapterConfig:
    """The adapter's config, checked field by field.

    Raises:
        Refused: another PEFT method (`peft-type-unsupported`), an unknown field that is set (`adapter-field-unknown`),
            a start that moved the base and can't be rebuilt (`adapter-base-moved`), a malformed value
            (`adapter-config`).
    """
    config = adapter.config
    where = f"{show(adapter.origin.asked)}/adapter_config.json"
    _expect_lora(config, where)
    for key, value in config.items():
        if key in _REFUSED_FIELDS and value:
            what = f"`{key}` is set: {_REFUSED_FIELDS[key]}"
            raise Refused("adapter-field-unsupported", what, where=where, facts={"field": key})
        if value and key not in _NEUTRAL and key not in _IMPLEMENTED and key not in _REFUSED_FIELDS:
            raise Refused(
                "adapter-field-unknown",
                f"`{show(key)}` is set and unknown, so what it means for a merge is too",
                where=where,
                got=show(value),
                facts={"field": show(key)},
                next="merge it with the PEFT version that wrote it, or report the field",
            )
    read = _Fields(config, where)
    return AdapterConfig(
        r=read.number("r", 8, int, lambda n: n > 0),
        alpha=read.number("lora_alpha", 8, float, math.isfinite),
        use_rslora=read.flag("use_rslora"),
        use_dora=read.flag("use_dora"),
        lora_bias=read.flag("lora_bias"),
        bias=read.choice("bias", ("none", "all", "lora_only")),
        init="plain" if base_is_residual else _init(config.get("init_lora_weights", True), where),
        modules_to_save=tuple(read.names("modules_to_save")),
        rank_pattern=read.pattern("rank_pattern", int, lambda n: n > 0),
        alpha_pattern=read.pattern("alpha_pattern", float, math.isfinite),
        token_indices=read.tokens("trainable_token_indices"),
        task_type=str(config["task_type"]) if config.get("task_type") else None,
        ensure_weight_tying=read.flag("ensure_weight_tying"),
    )


def _expect_lora(config: Mapping[str, Any], where: str) -> None:
    kind = str(config.get("peft_type") or "")
    if kind == "LORA":
        return
    reason = _NOT_MERGEABLE.get(kind)
    if reason is not None:
        raise Refused("peft-type-unmergeable", f"{kind} can't be merged into weights: {reason}", where=where)
    raise Refused(
        "peft-type-unsupported",
        f"PEFT type {show(kind) or 'missing'} is not supported; LORA is (with rsLoRA and DoRA)",
        where=where,
        next="merge it with PEFT itself: PeftModel.from_pretrained(...).merge_and_unload()",
    )


def _init(value: Any, where: str) -> str:
    text = str(value).lower()
    if value is None or text in _HARMLESS_INITS:
        return "mica" if text == "mica" else "plain"
    if text in ("pissa", "olora"):
        return text
    reason = _LOST_INITS.get(text)
    if text.startswith("pissa_niter_"):
        reason = "the base was moved by a randomised SVD, which can't be drawn again"
    raise Refused(
        "adapter-base-moved" if reason else "adapter-field-unknown",
        f"init_lora_weights is {show(value)}: {reason or 'unknown'}",
        where=where,
        facts={"field": "init_lora_weights"},
        next=Steps(
            "merge into the base that training saved beside the adapter: ",
            Again(("--base", "DIR", "--base-is-residual")),
            "; or convert the adapter with PEFT's path_initial_model_for_weight_conversion",
        ),
    )


class _Fields:
    """Typed access to a JSON object that anyone may have written."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where

    def _bad(self, key: str, expected: str) -> Refused:
        got = show(self._config.get(key))
        return Refused(
            "adapter-config",
            f"`{key}` is malformed",
            where=self._where,
            expected=expected,
            got=got,
            facts={"field": key},
        )

    def number(self, key: str, default: int, kind: type, valid: Callable[[Any], bool]) -> Any:
        value = self._config.get(key)
        return default if value is None else self._number(key, value, kind, valid)

    def _number(self, key: str, value: Any, kind: type, valid: Callable[[Any], bool]) -> Any:
        allowed = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or abs(value) > 1e9 or not valid(value):
            raise self._bad(key, "a whole number above 0" if kind is int else "a finite number")
        return value

    def flag(self, key: str) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return bool(value)

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self._config.get(key)
        if value is None:
            return choices[0]
        if value not in choices:
            raise self._bad(key, " or ".join(choices))
        return str(value)

    def names(self, key: str) -> list[str]:
        value = self._config.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
            raise self._bad(key, "a list of module names")
        return list(value)

    def pattern(self, key: str, kind: type, valid: Callable[[Any], bool]) -> dict[str, Any]:
        value = self._config.get(key)
        if not value:
            return {}
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise self._bad(key, f"an object of at most {MAX_PATTERNS} patterns")
        for text, number in value.items():
            if not is_tame_regex(text):
                raise Refused(
                    "adapter-pattern",
                    f"`{key}` holds a pattern that is not a plain regular expression",
                    where=self._where,
                    got=show(text),
                    facts={"field": key},
                )
            self._number(key, number, kind, valid)
        return dict(value)

    def tokens(self, key: str) -> dict[str, tuple[int, ...]]:
        value = self._config.get(key)
        if not value:
            return {}
        lists = value if isinstance(value, dict) else {"": value}
        for rows in lists.values():
            sound = isinstance(rows, list) and all(
                isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in rows
            )
            if not sound:
                raise self._bad(key, "a list of token ids, or an object of such lists")
        return {name: tuple(rows) for name, rows in lists.items()}


def is_tame_regex(text: str) -> bool:
    """True for a regex that compiles and can't take exponential time: no repeated group, no back-reference, few stars.

    The patterns come from an input file, and Python's matcher backtracks.
    """
    if len(text) > MAX_PATTERN_LENGTH or re.search(r"\)[*+?{]|\(\?|\\[1-9]", text):
        return False
    if len(re.findall(r"(?<!\\)[*+{]", text)) > 3:
        return False
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True
