"""An adapter's config for tensors that were gathered: the run's own, checked against them, or rebuilt from shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from converter.converters.gather.peft_names import PeftNames
from converter.core.checkpoint import Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG, LORA_META
from converter.core.files.strict_json import load_json, parse_json
from converter.core.side_files import recorded
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command
from converter.errors import Refused, UsageError
from converter.families.words import CLASSIFIERS, LORA_EMBEDDING_PAIR, LORA_MAGNITUDE, LORA_PAIR
from converter.text import fold, show

HEADS = frozenset(CLASSIFIERS)
LORA_FILES = frozenset({ADAPTER_CONFIG, LORA_META})
"""Read here; neither goes along with the tensors as it is."""


def adapter_config(
    source: Checkpoint,
    names: PeftNames,
    tensors: Mapping[str, LazyTensor],
    alpha: float | None,
    context: Context,
    *,
    rslora: bool = False,
) -> dict[str, Any]:
    """The config that belongs to the gathered tensors.

    Args:
        tensors: by the trainer's names.
        alpha: what `--lora-alpha` says.
        rslora: what `--rslora` says.

    Raises:
        UsageError: nothing records alpha and it wasn't given (`lora-alpha-unknown`).
        Refused: the config found is for other tensors (`adapter-rank`, `peft-type-unsupported`), or it is lost and the
            tensors do not tell what it was (`adapter-config-lost`).
    """
    ranks = {
        f.module: tensors[f.raw].info.shape[0]
        for f in names.factors
        if f.kind in (LORA_PAIR[0], LORA_EMBEDDING_PAIR[0]) and tensors[f.raw].info.shape
    }
    where = show(source.origin.asked)
    config = recorded(source.side_files)
    rslora = rslora or (config is None and _meta(source.side_files).get("use_rslora") is True)
    if alpha is None and (config is None or not config.get("lora_alpha")):
        alpha = recorded_alpha(source.side_files, ranks.values(), where, context)
    if config is None:
        return _rebuilt(source, names, ranks, alpha, context, rslora=rslora)
    if str(config.get("peft_type")).upper() != "LORA":
        what = (
            f"the {ADAPTER_CONFIG} by the shards is of PEFT type {show(config.get('peft_type'))}, the tensors are LoRA"
        )
        raise Refused("peft-type-unsupported", what, where=where)
    patterns = config.get("rank_pattern")
    known = {config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())}
    wrong = [m for m, r in ranks.items() if r not in known]
    if wrong:
        raise Refused(
            "adapter-rank",
            f"the {ADAPTER_CONFIG} by the shards is not of this run: it has other ranks than {fold(wrong)}",
            where=where,
            expected=f"r = {show(config.get('r'))}",
            got=f"r = {ranks[wrong[0]]} in {show(wrong[0])}",
            next="remove it, or put the right one there",
        )
    if alpha is None and not config.get("lora_alpha"):
        said = show(config.get("lora_alpha"))
        text = f"the {ADAPTER_CONFIG} by the shards says lora_alpha = {said}: it was not known when that was written"
        raise _alpha_unknown(text, where)
    if alpha is not None and config.get("lora_alpha") != alpha:
        text = f"lora_alpha is {alpha:g} as given; the run's {ADAPTER_CONFIG} says {show(config.get('lora_alpha'))}"
        context.note("changes-numbers", "lora-alpha", text)
        config["lora_alpha"] = _number(alpha)
    if rslora and not config.get("use_rslora"):
        text = f"rsLoRA is on as given; the run's {ADAPTER_CONFIG} says that it was off"
        context.note("changes-numbers", "rslora", text)
        config["use_rslora"] = True
    return config


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _rebuilt(
    source: Checkpoint,
    names: PeftNames,
    ranks: Mapping[str, int],
    alpha: float | None,
    context: Context,
    *,
    rslora: bool,
) -> dict[str, Any]:
    asked = show(source.origin.asked)
    tokens = [f.module for f in names.factors if f.kind == "token_adapter.trainable_tokens_delta"]
    if tokens:
        raise Refused(
            "adapter-config-lost",
            f"there is no {ADAPTER_CONFIG} beside or above the shards, and which tokens were trained in {fold(tokens)} "
            "is in no tensor",
            where=asked,
            next=f"put the run's {ADAPTER_CONFIG} beside the shards, or one with the same trainable_token_indices",
        )
    if alpha is None:
        listed = ", ".join(str(r) for r in sorted(set(ranks.values())))
        text = f"there is no {ADAPTER_CONFIG} beside or above the shards, and no tensor records lora_alpha"
        raise _alpha_unknown(f"{text} (r = {listed})", asked)
    common = max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r))
    saved = list(dict.fromkeys(f.module for f in names.factors if f.kind == "modules_to_save"))
    is_head = any(m.rpartition(".")[2] in HEADS for m in [*saved, *names.targets])
    found = ", ".join(str(r) for r in sorted(set(ranks.values())))
    how = f"lora_alpha = {alpha:g} for every layer and rsLoRA {'on' if rslora else 'off'}, as given"
    text = f"{ADAPTER_CONFIG} rebuilt from shapes: r = {found}, {how}"
    context.note("changes-numbers", "adapter-config-rebuilt", text)
    return {
        "peft_type": "LORA",
        "task_type": head_task(source) if is_head else None,
        "base_model_name_or_path": None,
        "r": common,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_exact(m): r for m, r in ranks.items() if r != common},
        "alpha_pattern": {},
        # Whole names: the last words alone could match layers that were not trained.
        "target_modules": names.targets,
        "modules_to_save": [m.rpartition(".")[2] for m in saved] or None,
        "use_dora": any(f.kind == LORA_MAGNITUDE for f in names.factors),
        "use_rslora": rslora,
        "lora_bias": any(f.kind == "lora_B" and f.leaf == "bias" for f in names.factors),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _alpha_unknown(what: str, where: str) -> UsageError:
    command = Command("gather", (where, "OUT", "--lora-alpha", "N"))
    step = Again(("--lora-alpha", "N"), otherwise=command)
    return UsageError("lora-alpha-unknown", what, where=where, next=step)


def _exact(module: str) -> str:
    return "^" + module.replace(".", r"\.")


def head_task(source: Checkpoint) -> str:
    """PEFT's name for the class that the head belongs to; token classification is verl's critic."""
    classes = source.config.get("architectures")
    is_token = isinstance(classes, list) and any(str(c).endswith("ForTokenClassification") for c in classes)
    return "TOKEN_CLS" if is_token else "SEQ_CLS"


def with_folded_heads(
    config: Mapping[str, Any], names: PeftNames, heads: Sequence[str], *, task: str = "SEQ_CLS"
) -> dict[str, Any]:
    """The config of an adapter whose heads, LoRA over a random frozen weight, are saved whole instead."""
    if not heads:
        return dict(config)
    last = {h.rpartition(".")[2] for h in heads}
    saved = [n for n in config.get("modules_to_save") or [] if isinstance(n, str)]
    kept = [m for m in names.targets if m not in heads]
    named = config.get("target_modules")
    if isinstance(named, list) and all(isinstance(n, str) for n in named):
        targets = [n for n in named if n not in last and n not in heads]
    else:
        targets = kept  # a pattern, or `all-linear`, would match the head again
    changed = {"target_modules": targets, "modules_to_save": list(dict.fromkeys([*saved, *sorted(last)]))}
    return {**config, **changed, "task_type": config.get("task_type") or task}


def _meta(files: Mapping[str, SideFile]) -> dict[str, Any]:
    """What a trainer's own record of the adapter says; nothing where there is none."""
    file = files.get(LORA_META)
    if file is not None and file.content is not None:
        value = parse_json(file.content, where=LORA_META)
    else:
        value = None if file is None or file.source is None else load_json(Path(file.source))
    return value if isinstance(value, dict) else {}


def recorded_alpha(files: Mapping[str, SideFile], ranks: Collection[int], where: str, context: Context) -> float | None:
    """The alpha that the file records; None where there is no file, or it says 0.

    Raises:
        Refused: it is of LoRA with another rank than the tensors (`adapter-rank`).
    """
    value = _meta(files)
    rank, alpha = value.get("r"), value.get("lora_alpha")
    if type(rank) is int and rank > 0 and rank not in ranks:
        raise Refused(
            "adapter-rank",
            f"the {LORA_META} by the shards is not of this run",
            where=where,
            expected=f"r = {rank}",
            got=f"r = {', '.join(map(str, sorted(set(ranks))))} in the tensors",
            next="remove it, or put the right one there",
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        return None
    context.note("info", "found", f"lora_alpha = {show(alpha)} as {LORA_META} records")
    return float(alpha)
