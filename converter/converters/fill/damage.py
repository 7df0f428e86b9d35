"""What a checkpoint lost: empty tensors, pieces of tensors, missing ones, and heads without a weight."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.converters.fill.evidence import is_empty
from converter.converters.gather.adapter_config import HEADS
from converter.core.checkpoint import Checkpoint
from converter.core.files.names import ADAPTER_STEM
from converter.core.tensors.nodes import Filled
from converter.families.expected import Unknown, compare, expected
from converter.families.factors import factor_in_name, factor_pairs
from converter.families.memory_names import classifier
from converter.families.words import (
    IN_PEFT,
    INPUT_MODULES,
    INPUTS,
    LORA_MAGNITUDE,
    OUTPUT_MODULES,
    OUTPUTS,
    PEFT_PREFIX,
)

Shape = tuple[int, ...]

EMPTY = "torch.Size([0])"
MISSING = "missing"
_NUMBER = re.compile(r"\d+")
# Weights of two or more dimensions in every architecture; one that is flat is one rank's piece.
_EMBEDDINGS = "|".join((*INPUT_MODULES, *OUTPUT_MODULES))
_MATRIX = re.compile(
    rf"(?:^|[._])(?:\w*proj|wpe|score|query_key_value|c_attn|c_fc|fc[12]|{_EMBEDDINGS})"
    r"\.(?:base_layer\.)?weight$"
)
_IN_PEFT = frozenset(IN_PEFT)
_HEAD_CLASSES = ("ForSequenceClassification", "ForTokenClassification", "ForRewardModeling")


@dataclass(frozen=True)
class Damage:
    """A tensor that is lost, and what there is in its place: `torch.Size([0])`, `missing`, or a shape.

    Attributes:
        expected: the shape that the run proves.
        likely: the shape that the base or another layer has, for screens.
    """

    name: str
    found: str
    expected: Shape | None = None
    likely: Shape | None = None


def find_damage(checkpoint: Checkpoint, expected: Mapping[str, Shape], loose: Mapping[str, Shape]) -> list[Damage]:
    """Every tensor that is not what the model needs, in file order; missing ones last.

    Args:
        expected: names and shapes that another file of the run proves.
        loose: shapes in a base model, which may have been resized since: they only tell a flat piece from a whole.
    """
    found: list[Damage] = []
    known = _shapes_of_siblings(checkpoint)
    for name, tensor in checkpoint.tensors.items():
        shape = tensor.info.shape
        wanted = expected.get(name)
        if is_empty(tensor) and wanted != (0,):
            # A source's own placeholder has no bytes anywhere: the index names the tensor and no file has it.
            found.append(Damage(name, MISSING if isinstance(tensor, Filled) else EMPTY, wanted, loose.get(name)))
        elif wanted is not None and wanted != shape:
            found.append(Damage(name, f"shape {list(shape)}", wanted))
        elif wanted is None and len(shape) == 1 and _is_piece(name, loose, known):
            likely = loose.get(name) or known.get(_pattern(name))
            found.append(Damage(name, f"shape {list(shape)}", None, likely))
    for file, tensors in checkpoint.beside.items():
        if is_spare(checkpoint, file):
            continue
        found += [Damage(beside_name(file, n), EMPTY) for n, t in tensors.items() if is_empty(t)]
    tied = {n for group in checkpoint.ties for n in group if any(m in checkpoint.tensors for m in group)}
    here = checkpoint.tensors.keys() | checkpoint.dropped.keys() | tied
    found += [Damage(name, MISSING, shape) for name, shape in expected.items() if name not in here]
    return found


def beside_name(file: str, name: str) -> str:
    """What a tensor of a file beside the weights is called."""
    return f"{file}:{name}"


def is_spare(broken: Checkpoint, file: str) -> bool:
    """True for a file that could hold the model or the adapter itself, unlike a value head's."""
    return file.startswith((ADAPTER_STEM,) if broken.origin.kind == "adapter" else ("pytorch_model", "model"))


def _is_piece(name: str, loose: Mapping[str, Shape], siblings: Mapping[str, Shape]) -> bool:
    """True for a flat tensor whose name, base or siblings in other layers say that it has more dimensions."""
    factor = factor_in_name().match(name)
    if factor is not None and factor["kind"] != LORA_MAGNITUDE and not name.endswith(".bias"):
        return True
    return len(loose.get(name, ())) > 1 or len(siblings.get(_pattern(name), ())) > 1 or bool(_MATRIX.search(name))


def _shapes_of_siblings(checkpoint: Checkpoint) -> dict[str, Shape]:
    return {_pattern(n): t.info.shape for n, t in checkpoint.tensors.items() if len(t.info.shape) > 1}


def _pattern(name: str) -> str:
    return _NUMBER.sub("#", name)


def pairs_missing(names: Collection[str]) -> list[str]:
    """Factors whose partner is in the adapter and which are not: half of a LoRA is none."""
    lost = []
    for name in names:
        for kind, other in factor_pairs():
            for a, b in ((kind, other), (other, kind)):
                if f".{a}" in name and name.endswith((a, f"{a}.weight")):
                    head, _, tail = name.rpartition(f".{a}")
                    partner = f"{head}.{b}{tail}"
                    lost += [partner] if partner not in names else []
    return list(dict.fromkeys(lost))


def heads_without_weight(checkpoint: Checkpoint) -> list[str]:
    """Heads that LoRA changes and whose own weight the adapter does not hold: W0 of W0 + BA."""
    found: dict[str, None] = {}
    for name in checkpoint.tensors:
        match = factor_in_name().match(name.removeprefix(PEFT_PREFIX))
        if match is not None and match["module"].rpartition(".")[2] in HEADS:
            own = (f"{PEFT_PREFIX}{match['module']}{mid}.weight" for mid in ("", ".base_layer"))
            if not any(n in checkpoint.tensors and not is_empty(checkpoint.tensors[n]) for n in own):
                found[match["module"]] = None
    return list(found)


def has_headless_class(checkpoint: Checkpoint) -> bool:
    """True for an adapter of a classifier that holds nothing of the head: it was random, frozen, and left out."""
    mapping: Any = checkpoint.config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    modules = {m for n in checkpoint.tensors for m in n.split(".")}
    return isinstance(named, str) and named.endswith(_HEAD_CLASSES) and not modules & HEADS


def lacks_of_class(model: Checkpoint) -> list[Damage]:
    """Backbone tensors that the model's class asks for and the folder lacks, or has in another shape.

    Nothing where the names are not the class's own: those are to be renamed first, and heads are judged by themselves.
    """
    wanted = expected(model.config)
    if isinstance(wanted, Unknown) or any(m in n for n in model.tensors for m in (".base_layer.", ".lora_")):
        return []
    found = compare({n: t.info.shape for n, t in model.tensors.items()}, wanted, model.config)
    if 2 * len(found.missing) > found.asked or found.is_renamed:
        return []
    lost = [Damage(n, MISSING, s, s) for n, s in found.missing.items() if not wanted.is_outside(n)]
    rows = {have[1:] == asked[1:] and have[:1] > asked[:1] for have, asked in found.misshapen.values()}
    if rows == {True} or _is_of_vocabulary(model, found.misshapen):
        return lost  # a vocabulary of another height: a matter of config.json
    cut = {n: pair for n, pair in found.misshapen.items() if pair[0] != (0,) and not wanted.is_outside(n)}
    return lost + [Damage(n, f"shape {list(have)}", asked, asked) for n, (have, asked) in cut.items()]


def _is_of_vocabulary(model: Checkpoint, misshapen: Mapping[str, tuple[Shape, Shape]]) -> bool:
    """True where every embedding has one other height, and nothing else differs: no slice of a model is like that."""
    vocabulary = model.config.get("vocab_size")
    rows = {have[:1] for have, asked in misshapen.values() if asked[:1] == (vocabulary,) and have[1:] == asked[1:]}
    embeddings = {n for n in model.tensors if n.endswith((*INPUTS, *OUTPUTS))}
    return len(rows) == 1 and bool(embeddings) and misshapen.keys() == embeddings


def missing_heads(model: Checkpoint) -> list[str]:
    """Tensors of the head that the model's class has and the folder has not: loading would start them at random.

    A head under another name, behind a wrapper's, or in a file of its own, is one to rename, and not lost.
    """
    named = model.config.get("architectures")
    if (
        not isinstance(named, list)
        or not named
        or model.beside.keys() - {f for f in model.beside if is_spare(model, f)}
    ):
        return []
    if any(not HEADS.isdisjoint(n.split(".")[1:]) for n in model.tensors):
        return []
    if any(n.split(".")[0] in HEADS and n.split(".")[1] in _IN_PEFT for n in model.tensors if n.count(".") > 1):
        return []  # trained whole beside LoRA, or under it, in a model that was neither merged nor split
    if any("head" in n.partition(".")[0] and n.partition(".")[0] not in OUTPUT_MODULES for n in model.tensors):
        return []
    built = classifier(model.config, {"auto_mapping": {"base_model_class": named[0]}})
    return [] if built is None else [n for n in built.missing(model.tensors) if n in built.own]


def is_trained_whole(module: str, config: Mapping[str, Any]) -> bool:
    """True for a module that the adapter's config lists in `modules_to_save`."""
    saved = config.get("modules_to_save")
    names = saved if isinstance(saved, Iterable) and not isinstance(saved, str) else []
    return any(module == n or module.endswith(f".{n}") for n in names if isinstance(n, str))
