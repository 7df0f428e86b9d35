"""Names and shapes of the tensors that a model's config implies: from a table for known classes, else from its counts.

`implied_shapes.json` has, for each class, the names that transformers' own save writes, `N` for every number that
counts layers or experts, with each count and each dimension as an expression of the config's fields. It is data:
transformers is not imported. For a class that the table does not have, what can be told is less: every layer that the
config counts is there with the tensors that its siblings have, the embeddings have the vocabulary's rows, and an
output embedding is there unless it is tied.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.families.ties import is_tied, tie_word
from converter.families.words import (
    CLASSIFIERS,
    DECODER_CLASSES,
    INPUT,
    NOT_TEXT,
    OLD_BUFFERS,
    OUTPUT,
    OUTPUT_MODULES,
    WRAPPED_CLASS,
    without_wrappers,
)
from converter.text import fold, show

Shape = tuple[int, ...]

_DATA = Path(__file__).with_name("implied_shapes.json")
MOST_TENSORS = 1_000_000
"""More than any model has: a config may claim any number of layers."""

_LAYER = re.compile(r"^(?P<list>(?:[A-Za-z_]\w*\.)*?(?:layers?|h|blocks?))\.(?P<number>\d+)\.(?P<rest>.+)$", re.ASCII)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOWER = re.compile("|".join((*NOT_TEXT, "projector")))
_NORM = re.compile(r"norm|(?:^|[._])ln_|layernorm", re.IGNORECASE)
# Heads of trainers, and output embeddings of classifiers: no part of the class, and no fault of the set.
_HEADS = "|".join((*CLASSIFIERS, *OUTPUT_MODULES))
_HEAD = re.compile(rf"^(?:model\.|transformer\.)?(?:\w*head\w*|score\w*|value\w*|reward\w*|{_HEADS})\.")


@dataclass(frozen=True)
class Implied:
    """What a config implies of the tensors on disk.

    Attributes:
        shapes: every tensor that must be there, by name.
        optional: what may be stored beside: the second name of a tie.
        passes: patterns of names that a load passes over, where they are too many.
    """

    shapes: Mapping[str, Shape]
    optional: Mapping[str, Shape]
    passes: tuple[str, ...] = ()


@functools.cache
def _text() -> str:
    return _DATA.read_text(encoding="utf-8")


def _value_of(mark: str) -> Any:
    """The JSON value behind a mark of the table; None without one. Nothing else is parsed: a model is of one class."""
    at = _text().find(mark)
    return None if at < 0 else json.JSONDecoder().raw_decode(_text(), at + len(mark))[0]


@functools.lru_cache(maxsize=16)
def _entry(name: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = _value_of(f'\n"{name}": ')
    return found


def version() -> str:
    """The transformers release that the table was made with."""
    return str(_value_of('"transformers": '))


def classes() -> tuple[str, ...]:
    """Every class that the table has."""
    return tuple(json.loads(_text())["classes"])


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, without a trainer's wrapper."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return WRAPPED_CLASS.sub("", first) if isinstance(first, str) else None


def fields(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, int]:
    """The config's counts, with those that are inferred from others where it leaves them out."""
    known = dict(defaults or {}) | {k: v for k, v in config.items() if v is not None}
    found = {k: v for k, v in known.items() if isinstance(v, int) and not isinstance(v, bool)}
    heads = found.get("num_attention_heads", found.get("n_head"))
    hidden = found.get("hidden_size", found.get("n_embd"))
    if heads and "num_key_value_heads" not in found:
        found["num_key_value_heads"] = heads
    if heads and hidden and "head_dim" not in found:
        found["head_dim"] = hidden // heads
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) and labels else found.get("num_labels", 2)
    return found | {"num_labels": count}


def evaluate(expression: str, known: Mapping[str, int]) -> int:
    """A sum of products of fields and numbers: `3*n_embd`, `hidden_size+2*num_key_value_heads*head_dim`.

    Raises:
        KeyError: the config has no such field.
    """
    total = 0
    for term in expression.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdecimal() else known[factor]
        total += product
    return total


def implied(config: Mapping[str, Any]) -> Implied | None:
    """The tensors of the config's class; None where the table has no such class, or not with these settings."""
    name = class_of(config)
    entry = _entry(name) if name is not None and name.isidentifier() else None
    return None if entry is None else of_entry(entry, config)


def of_entry(entry: Mapping[str, Any], config: Mapping[str, Any]) -> Implied | None:
    """The tensors of a class by its entry in the table; None for settings that the entry is not of."""
    # Keys by other names that the config class takes too: `num_experts` is what transformers 4 wrote for Qwen3-MoE.
    aliases = {real: config[other] for other, real in entry.get("aliases", {}).items() if other in config}
    config = {**aliases, **config}
    if any(config.get(k, v) != v for k, v in entry["assumes"].items()):
        return None
    known = fields(config, entry["defaults"])
    shapes: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    try:
        for name, counts, dims in entry["tensors"]:
            shape = tuple(evaluate(d, known) for d in dims)
            into = optional if name in entry["tied"] and is_tied(config) else shapes
            numbers = [max(evaluate(c, known), 0) for c in counts]
            if len(shapes) + math.prod(numbers) > MOST_TENSORS:
                return None
            for each in itertools.product(*map(range, numbers)):
                into[_numbered(name, each)] = shape
    except KeyError:
        return None
    return Implied(shapes, optional, tuple(entry.get("passes", ())))


def _numbered(name: str, numbers: tuple[int, ...]) -> str:
    for number in numbers:
        name = name.replace(".N.", f".{number}.", 1)
    return name


def lacks(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> list[str]:
    """What keeps these tensors from being the config's model, in words; nothing where they are all of it."""
    stored = {without_wrappers(n): s for n, s in shapes.items()}
    wanted = implied(config)
    if wanted is None:
        return list(_by_counts(stored, config))
    return list(_by_table(_with_prefix(stored, wanted), wanted))


def _with_prefix(stored: Mapping[str, Shape], wanted: Implied) -> Mapping[str, Shape]:
    """The names of a bare backbone as its class with a head has them; transformers loads either."""
    prefix = next((n.partition(".")[0] for n in wanted.shapes if _LAYER.match(n)), "")
    inside = {n for n in wanted.shapes if n.startswith(f"{prefix}.")}
    if not prefix or prefix in ("layers", "h") or any(n.startswith(f"{prefix}.") for n in stored):
        return stored
    return {f"{prefix}.{n}" if f"{prefix}.{n}" in inside else n: s for n, s in stored.items()}


def _by_table(stored: Mapping[str, Shape], wanted: Implied) -> Iterator[str]:
    missing = [n for n in wanted.shapes if n not in stored]
    if missing:
        yield f"{len(missing)} of {len(wanted.shapes)} tensors are not in it: {fold(missing)}"
    every = {**wanted.optional, **wanted.shapes}
    other = [n for n, s in stored.items() if n in every and s != every[n] and s != (0,)]
    if other:
        first = other[0]
        yield (
            f"{len(other)} tensors have other shapes than config.json implies: "
            f"{show(first)} {_dims(stored[first])} for {_dims(every[first])}"
        )
    unknown = [n for n in stored if n not in every and not n.endswith(OLD_BUFFERS) and _HEAD.match(n) is None]
    if unknown:
        yield f"{len(unknown)} tensors are none of the model's: {fold(unknown)}"


def _by_counts(stored: Mapping[str, Shape], config: Mapping[str, Any]) -> Iterator[str]:
    """By what any transformer has: its layers, its embeddings, its output."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    known = fields(text)
    count = _count(known)
    lists: dict[str, dict[int, dict[str, Shape]]] = {}
    for name, shape in stored.items():
        if (match := _LAYER.match(name)) is not None:
            lists.setdefault(match["list"], {}).setdefault(int(match["number"]), {})[match["rest"]] = shape
    own = {k: v for k, v in lists.items() if not _TOWER.search(k)}
    if config.get("is_encoder_decoder") is True or not own or count is None:
        yield "config.json and the names do not tell how many layers there are"
        return
    for where, layers in lists.items():
        total = count if where in own else max(layers) + 1
        absent = [str(n) for n in range(min(total, len(layers) + 3)) if n not in layers]
        if absent or max(layers) >= total:
            first = f": number {absent[0]} is not in it" if absent else ""
            yield f"{show(where)} has {len(layers)} layers and config.json counts {total}{first}"
        yield from _unlike(where, layers)
    outside = {n: s for n, s in stored.items() if _LAYER.match(n) is None}
    yield from _ends(outside, lists, text, config, known)


def _unlike(where: str, layers: Mapping[int, Mapping[str, Shape]]) -> Iterator[str]:
    """Layers that lack what their siblings have. Kinds of layers may take turns, if each is there more than once."""
    modules: dict[str, dict[frozenset[str], list[int]]] = {}
    every = {name.partition(".")[0] for tensors in layers.values() for name in tensors}
    for number, tensors in layers.items():
        for module in every:
            own = frozenset(n for n in tensors if n.partition(".")[0] == module)
            modules.setdefault(module, {}).setdefault(own, []).append(number)
    for kinds in modules.values():
        for names, numbers in kinds.items():
            fuller = next((other for other in kinds if names < other), None) if names else None
            if fuller is not None:
                yield f"layer {numbers[0]} of {show(where)} lacks {fold(sorted(fuller - names))}, which others have"
                return
            if len(kinds) > 1 and len(numbers) == 1:
                yield f"layer {numbers[0]} of {show(where)} is like no other: whether it is whole can't be told"
                return
            first = layers[numbers[0]]
            other = next((n for n in numbers for k in names if layers[n][k] not in (first[k], (0,))), None)
            if other is not None and all(first[k] != (0,) for k in names):
                yield f"layer {other} of {show(where)} has tensors of other shapes than layer {numbers[0]}"
                return


def _count(known: Mapping[str, int]) -> int | None:
    """How many layers the config counts."""
    return next((known[f] for f in _LAYERS if f in known), None)


def _ends(
    outside: Mapping[str, Shape],
    lists: Mapping[str, Mapping[int, Mapping[str, Shape]]],
    text: Mapping[str, Any],
    config: Mapping[str, Any],
    known: Mapping[str, int],
) -> Iterator[str]:
    """The embeddings, the last norm and the head."""
    hidden = known.get("hidden_size", known.get("n_embd", known.get("d_model")))
    rows = known.get("vocab_size")
    embeddings = {n: s for n, s in outside.items() if INPUT.search(n) and not _TOWER.search(n)}
    outputs = {n: s for n, s in outside.items() if OUTPUT.search(n)}
    if not embeddings:
        yield "the input embedding is not in it"
    for name, shape in (embeddings | outputs).items():
        if shape != (0,) and (len(shape) != 2 or rows not in (None, shape[0]) or hidden not in (None, shape[1])):
            yield f"{show(name)} is {_dims(shape)}, and config.json says {rows} rows of {hidden}"
    tied = tie_word(config) is not False
    if (class_of(config) or "").endswith(DECODER_CLASSES) and not tied and not outputs:
        yield "the output embedding is not in it, and config.json does not tie it"
    inside = any(_NORM.search(r) for layers in lists.values() for layer in layers.values() for r in layer)
    if inside and not any(_NORM.search(n) and not _TOWER.search(n) for n in outside):
        yield "the norm outside of the layers is not in it"


def _dims(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
