"""`config.json` as the target's loader needs it: the class, labels, pad token, and no key of where it came from."""

from __future__ import annotations

from typing import Any

from converter.converters.heads.fit import Fitted
from converter.converters.heads.model import Reading, no_class
from converter.core.context import Context
from converter.dialects.known import Target
from converter.dialects.spec import ConfigRules
from converter.errors import Refused
from converter.families.family import Family
from converter.families.words import CAUSAL_CLASSES
from converter.text import show

_LABEL_KEYS = ("num_labels", "id2label", "label2id", "problem_type")
_CAUSAL_SUFFIXES = CAUSAL_CLASSES
_CRITIC_CLASSES = ("CriticModel", "ForTokenClassification")


def config_for(reading: Reading, fitted: Fitted | None, target: Target, context: Context) -> dict[str, Any]:
    """The config of an output.

    Raises:
        Refused: transformers has no class that the trainer would load (`no-class`), or the trainer none (`family`).
    """
    source, kind, rules = reading.checkpoint.config, reading.family, target.dialect.config
    _refuse_family(reading, target)
    gone = {*reading.dialect.config.keys, *rules.keys, *rules.drops, "auto_map"}
    config = {k: v for k, v in source.items() if k not in gone}
    if kind.kind and source.get("model_type") != kind.kind:
        config["model_type"] = kind.kind
    config["architectures"] = [class_name(rules, kind, target)]
    if "auto_map" in source:
        context.note("info", "auto-map", "auto_map is left out of config.json: it names the source's own code")
    for key in rules.numbers:
        if isinstance(config.get(key), str):
            config[key] = float(config[key])
    config |= dict(rules.sets)
    rows = 1 if fitted is None else fitted.rows
    if rules.labels:
        _set_labels(config, rows)
    else:
        config = {k: v for k, v in config.items() if k not in _LABEL_KEYS}
    if rules.rows_key:
        config[rules.rows_key] = rows
    if rules.role_key:
        config[rules.role_key] = target.role
    if fitted is not None:
        config |= fitted.config
    if rules.pad:
        _set_pad(config, reading, context)
    if reading.head is not None and fitted is not None:
        _say_pooling(config, reading, target, context)
        _say_alignment(reading, target, context)
    return config


def _refuse_family(reading: Reading, target: Target) -> None:
    dialect, where = target.dialect, show(reading.checkpoint.origin.asked)
    if reading.dialect.own_backbone:
        what = (
            f"{reading.dialect.own_backbone} has a backbone of its own that transformers lacks: only its code loads it"
        )
        raise Refused("backbone-code", what, where=where)
    if dialect.families and reading.family.kind not in dialect.families:
        what = f"{dialect.about} has no model of type {reading.family.words()}"
        raise Refused("family", what, where=where, expected=", ".join(dialect.families))


def class_name(rules: ConfigRules, kind: Family, target: Target) -> str:
    """What `architectures` says.

    Raises:
        Refused: there is no such class (`no-class`), or its head isn't one layer on one token (`head-not-linear`).
    """
    word = rules.critic if target.role == "critic" else rules.reward
    if word == "seqcls" and kind.is_encoder:
        what = f"{kind.seqcls} scores with more than one linear layer on one token: no decoder's head fits it"
        raise Refused("head-not-linear", what)
    known = {"seqcls": kind.seqcls, "tokcls": kind.tokcls, "causal": kind.causal, "{Family}ForScore": kind.causal}
    if word not in known:
        return word
    found = known[word]
    if found is None or (word == "tokcls" and kind.tokcls_stem is None):
        suffix = {"seqcls": "ForSequenceClassification", "tokcls": "ForTokenClassification"}.get(word, "ForCausalLM")
        raise no_class(kind, suffix)
    if word != "{Family}ForScore":
        return found
    stem = next((found.removesuffix(s) for s in _CAUSAL_SUFFIXES if found.endswith(s)), found)
    return f"{stem}ForScore"


def _set_labels(config: dict[str, Any], rows: int) -> None:
    """Labels by number; names that are there stay where their number is right."""
    names = config.get("id2label")
    if not isinstance(names, dict) or len(names) != rows:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
    config["num_labels"] = rows


def _set_pad(config: dict[str, Any], reading: Reading, context: Context) -> None:
    if config.get("pad_token_id") is not None:
        return
    from converter.converters.merge.task_head import pad_token_of

    pad = pad_token_of(reading.checkpoint.side_files)
    if pad is None:
        text = (
            "no pad token is known: batches of more than one row will fail or be scored at the wrong place. "
            "Set pad_token_id in the output's config.json to the id that the tokenizer pads with"
        )
        context.note("changes-numbers", "pad-token-missing", text)
        return
    config["pad_token_id"] = pad
    context.note("info", "pad-token", f"pad_token_id {pad}, from the tokenizer")


def _say_pooling(config: dict[str, Any], reading: Reading, target: Target, context: Context) -> None:
    """Two loaders that score at different tokens give different rewards from the same tensors."""
    ours, theirs = reading.dialect.pooling, target.dialect.pooling
    if ours == "configured" and reading.checkpoint.config.get("pooling") == "last":
        ours = "last-attended"
    if target.role != "reward" or ours == theirs or ours == "none":
        return
    if ours not in ("last-attended", "last-non-pad"):
        how = {
            "reward-token": "its reward token",
            "logit-0": "the last token",
            "configured": "the mean over all tokens",
        }
        text = f"{reading.dialect.about} scores at {how[ours]}, {target.words} at the {_pooling_words(theirs)}"
        context.note("changes-numbers", "pooling", text)
        return
    if _pad_is_eos(config):
        text = (
            f"pad and EOS are one token: {_pooling_words(ours)} was scored, and {target.words} scores the "
            f"{_pooling_words(theirs)}, which is another where the answer ends with EOS. Give the tokenizer and "
            "config.json a pad token of its own"
        )
        context.note("changes-numbers", "pad-is-eos", text)


def _pooling_words(pooling: str) -> str:
    return {"last-attended": "last attended token", "last-non-pad": "last token that isn't pad"}.get(pooling, pooling)


def _pad_is_eos(config: dict[str, Any]) -> bool:
    pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    return pad is not None and pad in (eos if isinstance(eos, list) else [eos])


def _say_alignment(reading: Reading, target: Target, context: Context) -> None:
    """Critics differ in whether the last position has a value."""
    names = reading.checkpoint.config.get("architectures")
    first = str(names[0]) if isinstance(names, list) and names else ""
    was_critic = reading.dialect.reward is None or first.endswith(_CRITIC_CLASSES) or reading.dialect.mostly_critic
    ours, theirs = reading.dialect.alignment, target.dialect.alignment
    if target.role == "critic" and was_critic and ours != theirs:
        how = {"all": "keeps a value for each position", "drop-last": "drops the last position's value"}
        text = f"{reading.dialect.about} {how[ours]}, {target.words} {how[theirs]}"
        context.note("changes-numbers", "alignment", text)
