"""Fields of adapter_config.json: which values each may have, and what a merge makes of them.

A field is read by one of the functions here; what `read` gives is what `AdapterConfig.fields` holds. Fields that only
say how the adapter was trained are `ignored`; those whose arithmetic is not implemented are `refused` once they are
set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.converters.merge.patterns import is_tame_regex
from converter.errors import Refused
from converter.text import show

MAX_PATTERNS = 20_000


@dataclass(frozen=True)
class Field:
    """One field of a method's config.

    Attributes:
        read: the checked value, of the one in the file (None: not there) and where the file is; raises for a bad one.
        refused: why a merge stops where the field is set; empty: it does not.
        moves_base: the field says that the start of training moved the base; `--base-is-residual` passes over it, and
            `read` is asked for None.
    """

    read: Callable[[Any, str, str], Any]
    refused: str = ""
    moves_base: bool = False


def malformed(key: str, value: Any, where: str, expected: str) -> Refused:
    """The refusal of a value that the field can't have."""
    what = f"`{key}` is malformed"
    return Refused("adapter-config", what, where=where, expected=expected, got=show(value), facts={"field": key})


def _checked(key: str, value: Any, where: str, kind: type, valid: Callable[[Any], bool]) -> Any:
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or abs(value) > 1e9 or not valid(value):
        raise malformed(key, value, where, "a whole number above 0" if kind is int else "a finite number")
    return value


def ignored() -> Field:
    """A field that says nothing about the merge: the tensors present and the base's own layers say the rest."""
    return Field(lambda value, key, where: value)


def refused(why: str) -> Field:
    """A field that stops the merge once it is set."""
    return Field(lambda value, key, where: None, refused=why)


def count(default: int, *, least: int = 1) -> Field:
    """A whole number, above 0 unless `least` says otherwise."""
    return Field(lambda v, key, where: default if v is None else _checked(key, v, where, int, lambda n: n >= least))


def number(default: float) -> Field:
    """A finite number."""
    return Field(lambda v, key, where: default if v is None else _checked(key, v, where, float, math.isfinite))


def flag(default: bool = False) -> Field:
    """True or false."""

    def read(value: Any, key: str, where: str) -> bool:
        if value is not None and not isinstance(value, bool):
            raise malformed(key, value, where, "true or false")
        return default if value is None else value

    return Field(read)


def choice(*choices: str) -> Field:
    """One of several words; absent: the first."""

    def read(value: Any, key: str, where: str) -> str:
        if value is None:
            return choices[0]
        if value not in choices:
            raise malformed(key, value, where, " or ".join(choices))
        return str(value)

    return Field(read)


def of_training(*names: str, only: str = "") -> dict[str, Field]:
    """Fields that say how an adapter was trained and nothing about the merge, with those that most methods have.

    Args:
        only: the method's word of `bias`, where biases of its own layers can be trained alone (`vera_only`).
    """
    found = dict.fromkeys(("init_weights", "fan_in_fan_out", *names), ignored())
    return {**found, "bias": choice("none", "all", only)} if only else found


def names() -> Field:
    """A list of module names; absent: none."""

    def read(value: Any, key: str, where: str) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
            raise malformed(key, value, where, "a list of module names")
        return tuple(value)

    return Field(read)


def ranges() -> Field:
    """Pairs of whole numbers, the second above the first: stretches of a list."""

    def read(value: Any, key: str, where: str) -> tuple[tuple[int, int], ...]:
        if not value:
            return ()
        pairs = [p for p in value if isinstance(p, list | tuple) and len(p) == 2] if isinstance(value, list) else []
        whole = all(type(n) is int for p in pairs for n in p)
        if not pairs or len(pairs) != len(value) or not whole or not all(0 <= a < b for a, b in pairs):
            raise malformed(key, value, where, "a list of pairs such as [[0, 4], [2, 5]]")
        return tuple((a, b) for a, b in pairs)

    return Field(read)


def text() -> Field:
    """A word; absent or empty: None."""
    return Field(lambda value, key, where: str(value) if value else None)


def pattern(kind: type) -> Field:
    """Numbers by a regular expression over module names: whole ones above 0 (`int`), or finite ones (`float`)."""
    valid: Callable[[Any], bool] = (lambda n: n > 0) if kind is int else math.isfinite

    def read(value: Any, key: str, where: str) -> dict[str, Any]:
        if not value:
            return {}
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            raise malformed(key, value, where, f"an object of at most {MAX_PATTERNS} patterns")
        for regex, found in value.items():
            if not is_tame_regex(regex):
                what = f"`{key}` holds a pattern that is not a plain regular expression"
                raise Refused("adapter-pattern", what, where=where, got=show(regex), facts={"field": key})
            _checked(key, found, where, kind, valid)
        return dict(value)

    return Field(read)


def tokens() -> Field:
    """Token ids: a list, or an object of lists by module name; a list stands under `""`."""

    def read(value: Any, key: str, where: str) -> dict[str, tuple[int, ...]]:
        if not value:
            return {}
        lists = value if isinstance(value, dict) else {"": value}
        for rows in lists.values():
            sound = isinstance(rows, list) and all(
                isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in rows
            )
            if not sound:
                raise malformed(key, value, where, "a list of token ids, or an object of such lists")
        return {name: tuple(rows) for name, rows in lists.items()}

    return Field(read)


COMMON: Mapping[str, Field] = {
    "_name_or_path": ignored(),
    "auto_mapping": ignored(),
    "base_model_name_or_path": ignored(),
    "bias": choice("none", "all", "lora_only"),
    "ensure_weight_tying": flag(),
    "exclude_modules": ignored(),
    "inference_mode": ignored(),
    "layers_pattern": ignored(),
    "layers_to_transform": ignored(),
    "modules_to_save": names(),
    "peft_type": ignored(),
    "peft_version": ignored(),
    "revision": ignored(),
    "runtime_config": ignored(),
    "target_modules": ignored(),
    "task_type": text(),
    "trainable_token_indices": tokens(),
    "transformers_version": ignored(),
}
"""Fields that every method's config has, or may have."""
