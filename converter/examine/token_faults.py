"""What is wrong with a tokenizer's files, by themselves and beside the embedding: a load of the model shows none of it.

transformers makes a tokenizer of two tokens where the file with the vocabulary is not there, and gives a special token
that the vocabulary lacks a new number. A number without a row in the embedding stops a GPU in the middle of training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converter.converters.fix.vocabulary import tokens_in
from converter.core.files.names import ADDED_TOKENS, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from converter.core.tensors.dtypes import TensorInfo
from converter.errors import ConvertError
from converter.families.words import INPUT, NOT_TEXT
from converter.text import fold, show

Read = Callable[[str], Mapping[str, Any]]
Code = Literal["tokenizer-broken", "tokens-without-rows"]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WITHOUT_FILES = frozenset({"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"})
"""Tokenizers of bytes and characters, whose vocabulary is no file."""

_VOCABULARIES = (".model", ".tiktoken", ".spm", ".bpe", ".txt")
_NOT_VOCABULARIES = ("merges.txt",)
_SHARE = 8
"""More tokens beyond the rows than an eighth of these are a tokenizer of another size: small models for tests have one.
Few, none of them special, may be those of images, which this model has not.
"""


@dataclass(frozen=True)
class TokenFault:
    """One fault.

    Attributes:
        code: `tokenizer-broken`: it stops, or has no tokens; `tokens-without-rows`: the model stops at some.
        is_serious: False for tokens that text does not have, and for a stand-in that says of no tokenizer what it is.
    """

    code: Code
    text: str
    is_serious: bool = True


def text_rows(infos: Mapping[str, TensorInfo]) -> int | None:
    """Rows of the only embedding of text; None where there is none, or several."""
    found = [i.shape[0] for n, i in infos.items() if INPUT.search(n) and len(i.shape) == 2 and i.numel]
    return found[0] if len(found) == 1 and not any(w in n for n in infos if INPUT.search(n) for w in NOT_TEXT) else None


def token_faults(
    names: Collection[str], read: Read, config: Mapping[str, Any], rows: int | None
) -> Iterator[TokenFault]:
    """Every fault that is seen.

    Args:
        names: the folder's files.
        read: a JSON file of the folder, nothing of one that is not there; raises ConvertError for what is no JSON.
        config: config.json, or the part of it that is about text.
        rows: of the only embedding of text; None where there is none, or several.
    """
    for name in (TOKENIZER, TOKENIZER_CONFIG, VOCABULARY, ADDED_TOKENS):
        try:
            read(name)
        except ConvertError as error:
            yield TokenFault("tokenizer-broken", f"{name} can't be read: {error.what} ({error.code})")
            return
    settings, numbers = read(TOKENIZER_CONFIG), tokens_in(read)
    if TOKENIZER in names and numbers is None:
        # What has no model either was put there by hand, as a stand-in.
        yield TokenFault("tokenizer-broken", f"{TOKENIZER} has no vocabulary", is_serious="model" in read(TOKENIZER))
        return
    if TOKENIZER_CONFIG in names and not _has_vocabulary(names, settings):
        text = f"{TOKENIZER_CONFIG} is there, and no file with a vocabulary: a tokenizer without tokens is loaded"
        yield TokenFault("tokenizer-broken", text, is_serious=isinstance(settings.get("tokenizer_class"), str))
        return
    if rows is None:
        return
    if numbers is not None and TOKENIZER in names:
        yield from _without_rows(read, settings, numbers, rows)
    for name, of in (("config.json", config), (GENERATION_CONFIG, _or_nothing(read, GENERATION_CONFIG))):
        ends = of.get("eos_token_id")
        beyond = [n for n in (ends if isinstance(ends, list) else [ends]) if type(n) is int and n >= rows]
        if beyond:
            said = f"eos_token_id of {name} is {', '.join(map(str, beyond))}, and the embedding has {rows} rows"
            yield TokenFault("tokens-without-rows", f"{said}: no answer ends there", is_serious=False)


def _without_rows(read: Read, settings: Mapping[str, Any], numbers: int, rows: int) -> Iterator[TokenFault]:
    held = _numbers(read)
    specials = dict(_specials(settings))
    beyond = sorted(text for text, number in held.items() if number >= rows)
    if numbers > rows:
        named = [f"{key} {show(text)}" for key, text in specials.items() if text in beyond]
        text = f"the tokenizer has {numbers} tokens, and the embedding {rows} rows"
        text += f": {fold(named)} has none" if named else ""
        yield TokenFault("tokens-without-rows", text, is_serious=bool(named) and numbers - rows <= rows // _SHARE)
    lost = {text: key for key, text in specials.items() if text not in held}
    if lost and max(numbers, rows) < numbers + len(lost):
        said = f"{fold([f'{key} {show(text)}' for text, key in lost.items()])} not in the vocabulary"
        said += f": a load adds new tokens, and the embedding has {rows} rows"
        yield TokenFault("tokens-without-rows", said, is_serious=numbers + len(lost) - rows <= rows // _SHARE)


def _has_vocabulary(names: Collection[str], settings: Mapping[str, Any]) -> bool:
    if settings.get("auto_map") or str(settings.get("tokenizer_class")) in _WITHOUT_FILES:
        return True
    files = [n for n in names if n not in _NOT_VOCABULARIES]
    words = (TOKENIZER, VOCABULARY, "tekken.json")
    return any(n in words or n.endswith(_VOCABULARIES) or "vocab" in n or "sentencepiece" in n for n in files)


def _specials(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _SPECIAL:
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            yield key, text


def _numbers(read: Read) -> dict[str, int]:
    """The number of every token, by its text."""
    whole, decoder = read(TOKENIZER), read(TOKENIZER_CONFIG).get("added_tokens_decoder")
    model = whole.get("model")
    table = model.get("vocab") if isinstance(model, dict) else None
    pairs: list[tuple[Any, Any]] = []
    if isinstance(table, list):
        pairs += [(e[0], n) for n, e in enumerate(table) if isinstance(e, list) and e]
    pairs += list(table.items()) if isinstance(table, dict) else []
    added = whole.get("added_tokens")
    pairs += [(e.get("content"), e.get("id")) for e in added if isinstance(e, dict)] if isinstance(added, list) else []
    listed = decoder.items() if isinstance(decoder, dict) else ()
    pairs += [
        (e.get("content"), int(n)) for n, e in listed if isinstance(e, dict) and str(n).isdecimal() and len(n) < 10
    ]
    pairs += list(read(ADDED_TOKENS).items())
    return {text: number for text, number in pairs if isinstance(text, str) and type(number) is int}


def _or_nothing(read: Read, name: str) -> Mapping[str, Any]:
    try:
        return read(name)
    except ConvertError:
        return {}
