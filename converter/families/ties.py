"""Which names are one tensor for the model, though perhaps only one of them is stored; inferred from names and config.

`ties.json` has, for each class of transformers, the names that it makes one, and what each config class makes of a
config.json that is silent. On loading a tie is symmetric: whichever name is stored serves all. Where several are
stored and differ, transformers 5 keeps each, and transformers 4 the input embedding alone; headers can't tell, so the
group is listed and the values are a question for `Context.equal`. A class that the table does not have is judged by
the names of its embeddings.

Source: `get_expanded_tied_weights_keys` and `tie_weights`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py and, for the older rule,
https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/modeling_utils.py
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.families.memory_names import chosen_parts
from converter.families.words import CLASSES_WITH_OUTPUT, OTHER_OUTPUT_MODULES, OUTPUT_MODULES, WRAPPED_CLASS

_DATA = Path(__file__).with_name("ties.json")
_KEY = "tie_word_embeddings"

# For classes that the table does not have. Embedding and head as they are named on disk, tried in this order; the first
# whose embedding is stored is the pair.
_PAIRS = (
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("thinker.model.embed_tokens.weight", "thinker.lm_head.weight"),
    ("text_model.model.embed_tokens.weight", "text_model.lm_head.weight"),
    ("model.text_model.embed_tokens.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("gpt_neox_japanese.embed_in.weight", "embed_out.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("transformer.tokens_embed.weight", "lm_head.weight"),
    ("transformer.w.weight", "lm_head.weight"),
    ("biogpt.embed_tokens.weight", "output_projection.weight"),
    ("rwkv.embeddings.weight", "head.weight"),
)
_HEAD_OF_TYPE = {"whisper": "proj_out.weight", "moonshine": "proj_out.weight", "trocr": "output_projection.weight"}

# Heads of encoders: what is stored beside the head tells which it is; the head's bias is a second tie.
_WORD_EMBEDDINGS = re.compile(r"(?:\w+\.)?embeddings\.word_embeddings\.weight", re.ASCII)
_MASKED_HEADS = (
    ("cls.predictions.transform.dense.weight", "cls.predictions.decoder.weight", "cls.predictions.bias"),
    ("lm_head.dense.weight", "lm_head.decoder.weight", "lm_head.bias"),
    ("vocab_transform.weight", "vocab_projector.weight", None),
)


@dataclass(frozen=True)
class Tie:
    """Names that a class may make one tensor.

    Attributes:
        names: the input embedding first, output embeddings last; at least one is stored.
        newer: transformers 5 makes them one, where those that are stored are equal.
        older: transformers 4 makes them one, whatever is stored.
    """

    names: tuple[str, ...]
    newer: bool
    older: bool


@functools.cache
def _table() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    data["of_class"] = {name: rows for rows, names in data["classes"] for name in names}
    return data | {k: frozenset(data[k]) for k in ("silent", "always", "nested", "outer")}


def version(*, older: bool = False) -> str:
    """The transformers release that the data was taken from, or the older one that it was compared with."""
    return str(_table()["older"]["transformers"] if older else _table()["transformers"])


def is_tied(config: Mapping[str, Any]) -> bool:
    """True where transformers ties the output embedding to the input's, by config.json or where that is silent."""
    return tie_word(config) is True


def tie_word(config: Mapping[str, Any]) -> bool | None:
    """What transformers makes of a config's `tie_word_embeddings`.

    None where config.json is silent and its type does not tie by default: a model of a class that nobody knows may tie
    all the same.
    """
    kind, table = str(config.get("model_type")), _table()
    own, text = config.get(_KEY), _text(config).get(_KEY)
    if kind in table["always"] or (own is not True and text is True and kind in table["nested"]):
        return True
    if isinstance(own, bool):
        return own
    if kind in table["silent"]:
        return True
    return text if isinstance(text, bool) and kind not in table["outer"] else None


def was_tied(config: Mapping[str, Any]) -> bool:
    """True where transformers 4 ties: it asks the text model's config, whose defaults were others."""
    text = _text(config) or config
    word, older = text.get(_KEY), _table()["older"]
    if isinstance(word, bool):
        return word
    kind = str(text.get("model_type", config.get("model_type")))
    return kind in older["ties"] or (kind in _table()["silent"] and kind not in older["does not"])


def is_said(config: Mapping[str, Any]) -> bool:
    """True where config.json itself has a word on ties, be it its own or its text model's."""
    return any(isinstance(part.get(_KEY), bool) for part in (config, _text(config)))


def stored_pair(names: Collection[str], config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Input and output embedding among stored names, as the config's class calls them, whether it ties them or not."""
    said = {k: {**v, _KEY: True} for k, v in config.items() if isinstance(v, dict)}
    found = [n for tie in ties(names, {**config, **said, _KEY: True}) for n in tie.names if n in names]
    weights = [n for n in found if n.endswith(".weight")]
    return next((n for n in weights if not is_output(n)), None), next(filter(is_output, weights), None)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that ties nothing, in no part of it."""
    parts = {k: v for k, v in config.items() if isinstance(v, dict) and (_KEY in v or is_tied(v))}
    inner = {k: {**v, _KEY: False} for k, v in parts.items()}
    return {**config, **inner, _KEY: False}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else {}


def find_ties(names: Collection[str], config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Groups of tied names, the input embedding first; at least one of each group is stored."""
    return tuple(tie.names for tie in ties(names, config) if tie.newer)


def ties(names: Collection[str], config: Mapping[str, Any]) -> tuple[Tie, ...]:
    """Every group of names that some release makes one tensor by this config."""
    stored = frozenset(names)
    found = _of_class(stored, config)
    if found is None:
        found = tuple(Tie(g, True, was_tied(config) or "shared" in g[0]) for g in _by_names(stored, config))
    return found


# By the class


def _of_class(stored: frozenset[str], config: Mapping[str, Any]) -> tuple[Tie, ...] | None:
    """The groups of the config's class; None where the table has no such class, or other names than the stored."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    name = WRAPPED_CLASS.sub("", first) if isinstance(first, str) else ""
    known, rows = _table()["of_class"].get(name), list(_rows(name, config))
    if known is None and not rows:
        return None
    found = []
    for cls, own, spellings in rows:
        group = next((g for g in _spelled(spellings) if stored.intersection(g)), None)
        if group is not None:
            found += list(_tie(group, own, stored, is_new=cls in _table()["older"]["lacks"]))
    if (known or rows) and not found and not stored.isdisjoint(_generic_names()):
        return None
    return tuple(sorted(found, key=lambda tie: tie.names[0].endswith("bias")))


def _rows(name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], list[list[str]]]]:
    """Groups of a class, each with the class and the config that have the word on it.

    A part whose config names another model than the class has by default has the groups of that model, under its path.
    """
    chosen = {key: (path, cls) for path, key, cls in chosen_parts(name, config)}
    for part, *spellings in _table()["of_class"].get(name, ()):
        own = config if part == "" else config.get(part)
        if part not in chosen and isinstance(own, Mapping):
            yield name, own, spellings
    for key, (path, cls) in chosen.items():
        for each, own, spellings in _rows(cls, config[key]):
            yield each, own, [[f"{path}.{n}" for n in names] for names in spellings]


def _tie(group: tuple[str, ...], config: Mapping[str, Any], stored: frozenset[str], *, is_new: bool) -> Iterator[Tie]:
    """The group, where a release ties it; of a class that is newer than the older release, only the newer counts."""
    word = tie_word(config)
    if config.get(_KEY) is False and word is True:
        # T5: the copies are tied whatever the config says; a head of its own (T5 1.1) goes with `false`.
        group = tuple(n for n in group if n not in stored or not is_output(n))
    if word is None:
        # A silent config and no head: written by code that we don't know, and tied, or the model would not work.
        word = not any(is_output(n) and n in stored for n in group)
    older = not is_new and (was_tied(config) or (word and not any(map(is_output, group))))
    if len(group) > 1 and (word or older):
        yield Tie(group, word, older)


def _spelled(spellings: list[list[str]]) -> Iterator[tuple[str, ...]]:
    """A group's names on disk, in memory, and as a bare backbone has them; output embeddings last."""
    for each in spellings:
        yield tuple(sorted(each, key=is_output))
    for each in spellings:
        first, *rest = sorted(each, key=is_output)
        lead = first.partition(".")[0] + "."
        yield (first.removeprefix(lead), *(n.removeprefix(lead) for n in rest))


def is_output(name: str) -> bool:
    """True for the names that output embeddings have in some class."""
    modules = name.split(".")[:-1]
    return bool(modules) and (modules[-1] in _OUTPUT_WORDS or not _OUTPUT_PARTS.isdisjoint(modules))


_OUTPUT_WORDS = frozenset((*OUTPUT_MODULES, *OTHER_OUTPUT_MODULES))
_OUTPUT_PARTS = frozenset(("lm_head", "lm_heads", "pred_layer"))


# By names


@functools.cache
def _generic_names() -> frozenset[str]:
    return frozenset(n for embedding, _ in _PAIRS for n in (embedding, embedding.partition(".")[2]))


def _by_names(names: frozenset[str], config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    word = tie_word(config)
    with_head = _has_head(config)
    if "shared.weight" in names:
        copies = [f"{side}.embed_tokens.weight" for side in ("encoder", "decoder") if _any(names, f"{side}.")]
        own_head = "lm_head.weight" in names and config.get(_KEY) is False
        yield ("shared.weight", *copies, *(["lm_head.weight"] if with_head and not own_head else []))
        return
    if not with_head or word is False:
        return
    for embedding, head in _pairs(names, config):
        if word or head not in names:
            copies = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
            yield (embedding, *(copies if embedding.endswith("model.shared.weight") else []), head)
        return
    if word:
        yield from _masked(names)


def _pairs(names: frozenset[str], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The embedding and its head, if names show them: by the embedding, of a bare backbone too, else by the head."""
    special = _HEAD_OF_TYPE.get(str(config.get("model_type")))
    bare = [(embedding.partition(".")[2], head) for embedding, head in _PAIRS]
    for embedding, head in (*_PAIRS, *bare):
        if embedding in names:
            yield embedding, special or head
            return
    for embedding, head in _PAIRS:
        backbone = embedding.rsplit(".", 2)[0]
        if (special or head) in names and (_any(names, f"{backbone}.layers.") or _any(names, f"{backbone}.h.")):
            yield embedding, special or head
            return


def _masked(names: frozenset[str]) -> Iterator[tuple[str, ...]]:
    embedding = next((n for n in sorted(names) if _WORD_EMBEDDINGS.fullmatch(n)), None)
    for witness, head, bias in _MASKED_HEADS:
        if embedding is not None and witness in names:
            yield (embedding, head)
            if bias is not None:
                yield (bias, head.removesuffix("weight") + "bias")
            return


def _any(names: Collection[str], prefix: str) -> bool:
    return any(n.startswith(prefix) for n in names)


def _has_head(config: Mapping[str, Any]) -> bool:
    """True for classes with an output embedding, and where no class is named."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named:
        return True
    return any(isinstance(n, str) and n.endswith(CLASSES_WITH_OUTPUT) for n in named)
