"""`config.json` and the tokenizer against what a trainer's loader does with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from converter.converters.heads.config import class_name
from converter.converters.heads.model import Reading
from converter.core.checkpoint import MODEL, Checkpoint
from converter.core.context import MAX_READ
from converter.core.files.names import TOKENIZER_CONFIG, TOKENIZERS
from converter.core.files.strict_json import load_json
from converter.core.side_files import side_json
from converter.diagnostic import Command
from converter.dialects.known import Target, numbers
from converter.errors import ConvertError
from converter.examine.token_faults import TokenFault, text_rows, token_faults
from converter.examine.verify.check import Check, fails, holds, note
from converter.families.family import family
from converter.text import show


def check_normaliser(reading: Reading, target: Target) -> list[Check]:
    """mean and std that the loader has no use for, or loses."""
    if reading.normaliser is None or target.serves.keeps_mean:
        return []
    keys = reading.normaliser.keys
    if target.dialect.normaliser == "none":
        text = f"{keys} are of another dialect; {target.words} never subtracts or divides by them"
    else:
        text = (
            f"{keys}: under transformers 5 {target.words} reads them from uninitialised memory; leave normalisation off"
        )
    return [note("config", "normaliser", text)]


def check_config(checkpoint: Checkpoint, target: Target, remedy: Command) -> list[Check]:
    """The class, the labels, and keys that the loader stumbles over."""
    config, rules = checkpoint.config, target.dialect.config
    if target.role == "actor":
        return []
    found: list[Check] = []
    kind = family(config)
    if target.dialect.families and kind.kind not in target.dialect.families:
        text = f"{target.words} has no model of type {kind.words()}"
        return [fails("config", "family", text)]
    if target.serves.trainer == "verl" and numbers(target.version) >= (0, 9) and "hidden_dropout" in config:
        # Seen with verl 0.9.1 and transformers 5.5.4, which it asks for: GPT-NeoX, Bloom, Falcon, StableLM.
        text = f"{target.words} sets hidden_dropout to the string '0', which {kind.words()}'s config refuses to hold"
        return [fails("config", "family", text)]
    try:
        wanted = class_name(rules, kind, target)
    except ConvertError as error:
        return [fails("config", error.code, error.what, remedy)]
    listed = config.get("architectures")
    first = str(listed[0]) if isinstance(listed, list) and listed else "none"
    if first != wanted:
        text = f"architectures says {show(first)}, not {wanted}"
        if target.serves.goes_by_class:
            what = f"{text}: {target.words} {target.serves.goes_by_class}"
            found.append(fails("config", "architectures", what, remedy))
        else:
            found.append(note("config", "architectures", f"{text}; {target.words} doesn't look at it"))
    wrong = [f"{key} must not be in config.json for {target.words}" for key in rules.drops if key in config]
    wrong += [f"{key} is a string, on which layers fail" for key in rules.numbers if isinstance(config.get(key), str)]
    found += [fails("config", "config-key", text, remedy) for text in wrong]
    reads_labels = rules.labels and not target.serves.sets_labels
    if reads_labels and (labels := _labels(config)) != 1 and not target.serves.labels:
        text = f"config.json says {labels} labels, and the head has one: the loader raises a size mismatch"
        found.append(fails("config", "labels", text, remedy))
    if not found:
        found.append(holds("config", _config_words(first, config, rules.labels)))
    return found


def _labels(config: Mapping[str, Any]) -> int:
    """As transformers counts: `id2label`, else `num_labels`, else two."""
    named = config.get("id2label")
    if isinstance(named, Mapping):
        return len(named)
    return int(config.get("num_labels", 2))


def _config_words(name: str, config: Mapping[str, Any], labels: bool) -> str:
    words = [show(name)]
    if labels:
        words.append("1 label" if _labels(config) == 1 else f"{_labels(config)} labels")
    if config.get("value_head_prefix"):
        words.append(f"value_head_prefix {show(config['value_head_prefix'])}")
    return ", ".join(words)


def check_tokens(checkpoint: Checkpoint, target: Target) -> list[Check]:
    """The tokenizer's files, and the pad token where the scored position is found by it."""
    found: list[Check] = []
    names = set(checkpoint.side_files)
    if not names.intersection(TOKENIZERS):
        found.append(
            note("tokens", "tokenizer-missing", "there is no tokenizer in the folder; name one to the trainer")
        )
    pad, eos = checkpoint.config.get("pad_token_id"), checkpoint.config.get("eos_token_id")
    stops = eos if isinstance(eos, list) else [eos]
    if target.dialect.config.pad and target.role != "actor":
        if pad is None:
            text = f"config.json has no pad_token_id, by which {target.words} finds the scored token: batches fail"
            found.append(fails("tokens", "pad-token-missing", text))
        elif pad in stops:
            text = f"pad and EOS are both {pad}: an EOS at the end of an answer is skipped, not scored"
            found.append(note("tokens", "pad-is-eos", text))
    settings = _tokenizer_config(checkpoint)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        text = "tokenizer_class is TokenizersBackend, by transformers 5: a trainer on transformers 4 can't load it"
        found.append(note("tokens", "tokenizer-5", text))
    faults = list(_token_faults(checkpoint))
    found += [(fails if each.is_serious else note)("tokens", each.code, each.text) for each in faults]
    named = None if any(each.code == "tokenizer-broken" for each in faults) else _pad_text(settings)
    if named and not any(c.code == "pad-token-missing" for c in found):
        found.insert(
            0, holds("tokens", f"tokenizer there, pad {show(named)}" + (f" ({pad})" if pad is not None else ""))
        )
    return found


def _token_faults(checkpoint: Checkpoint) -> Iterator[TokenFault]:
    nested = checkpoint.config.get("text_config")
    config = nested if isinstance(nested, Mapping) else checkpoint.config
    rows = text_rows({n: t.info for n, t in checkpoint.tensors.items()}) if checkpoint.origin.kind == MODEL else None
    return token_faults(checkpoint.side_files, partial(side_json, checkpoint.side_files), config, rows)


def _tokenizer_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What tokenizer_config.json says; nothing where it isn't there or isn't JSON."""
    file = checkpoint.side_files.get(TOKENIZER_CONFIG)
    if file is None or file.source is None:
        return {}
    try:
        config = load_json(Path(file.source), limit=4 * MAX_READ)
    except ConvertError:
        return {}
    return config if isinstance(config, dict) else {}


def _pad_text(settings: Mapping[str, Any]) -> str | None:
    """The pad token's text."""
    token = settings.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
