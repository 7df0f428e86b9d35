"""LoRA of Megatron's fused matrices as LoRA of transformers' matrices, with PEFT's names: exact, factor by factor.

`linear_qkv` has one A and one B. Queries, keys and values are rows of what B writes, so each projection gets that A and
its own rows of B; gate and up projection likewise. Nothing is computed, and the product is the same number by number.

- Megatron-Bridge, NeMo-RL, verl: `M.adapter.linear_in.weight`, `M.adapter.linear_out.weight`; apart by projection
  (CanonicalLoRA): `M.adapter.adapter_q.linear_in.weight`
- ms-swift, ROLL: `M.lora_A.default.weight`, `M.lora_B.default.weight`, and `M.base_layer.weight`

Source: https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/067f987/src/megatron/bridge/peft/utils.py and
models/conversion/peft_bridge.py there; https://github.com/modelscope/ms-swift/blob/3602360/swift/megatron/utils/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.megatron.formulas import SizeError, Sizes, parts, sizes_of
from converter.families.megatron.names import ARGUMENTS_FILE, LAYER, layer_count
from converter.families.megatron.rows import ROWS, Row
from converter.families.words import LORA_PAIR, PEFT_PREFIX
from converter.text import fold, show

_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?:adapter\.(?:adapter_(?P<one>\w+?)\.)?linear_(?P<way>in|out)|lora_(?P<letter>[AB])\.\w+)\.weight",
    re.ASCII,
)
_OF_MEGATRON = re.compile(
    r"(?:^|\.)decoder\.layers\.\d+\.(?:self_attention|cross_attention|mlp)\.(?:\w+\.)*linear_\w+$"
)
_PARTS = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}
"""Which of a row's names an adapter of one projection is of."""
_FUSED = frozenset({"qkv", "halves"})


@dataclass
class _Found:
    """What an adapter's tensors became, and what has no place."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)


def is_lora(names: Iterable[str]) -> bool:
    """True where Megatron's modules have adapters. `lora_A.default` is PEFT's own name too, of whatever module."""
    found = (m for n in names if (m := _FACTOR.fullmatch(n)) is not None)
    return any(m["letter"] is None or _OF_MEGATRON.search(m["module"]) for m in found)


def with_peft_names(
    checkpoint: Checkpoint, base: Checkpoint | None, context: Context
) -> tuple[Checkpoint, dict[str, str]]:
    """The same run with the names that PEFT gives to a wrapped model of transformers, and the keys that they are of.

    Raises:
        Refused: the family is not in the table (`megatron-family`); an adapter of a module that has no LoRA in PEFT
            (`megatron-lora`); config.json is of another model (`megatron-config`).
    """
    where = show(checkpoint.origin.asked)
    config = checkpoint.config or (base.config if base is not None else {})
    rows, sizes = _table(config, where)
    if (count := layer_count(checkpoint.tensors)) > sizes.layers:
        what = f"config.json is not of this model: adapters are on {count} layers, and it has {sizes.layers}"
        raise Refused("megatron-config", what, where=where)
    by_key = {key: row for row in rows for key in (row.ours, *row.others)}
    found = _Found()
    wrapped = {m["module"] for n in checkpoint.tensors if (m := _FACTOR.fullmatch(n)) is not None}
    for name, tensor in checkpoint.tensors.items():
        _place(name, tensor, by_key, sizes, wrapped, found)
    found.unknown += _alone(checkpoint.tensors)
    if found.unknown:
        raise Refused(
            "megatron-lora",
            f"{len(found.unknown)} tensors beside or in adapters have no counterpart in a PEFT adapter, or one of two "
            f"factors is missing: {fold(list(dict.fromkeys(found.unknown)))}",
            where=where,
            next="merge or export the adapter with the trainer that wrote it (Megatron-Bridge, ms-swift)",
        )
    if found.misfits:
        told = "; ".join(f"{show(k)}: {why}" for k, why in [*found.misfits.items()][:4])
        raise Refused("megatron-config", f"config.json is not of this model: {told}", where=where)
    shared = sum(1 for m in wrapped if _row(m, by_key) in _FUSED)
    text = f"LoRA of {len(wrapped)} of Megatron's modules under PEFT's names"
    if shared:
        text += f"; in {shared} fused ones each projection has the shared A and its own rows of B, which is exact"
    context.note("info", "megatron-lora", text)
    files = {n: f for n, f in checkpoint.side_files.items() if n != ARGUMENTS_FILE}
    return checkpoint.replace(tensors=found.tensors, side_files=files), found.keys


def _alone(names: Iterable[str]) -> list[str]:
    """Factors whose other one is not there."""
    pairs: dict[tuple[str, str | None], list[str]] = {}
    for name in names:
        if (match := _FACTOR.fullmatch(name)) is not None:
            pairs.setdefault((match["module"], match["one"]), []).append(name)
    return [n for held in pairs.values() if len(held) != 2 for n in held]


def _row(module: str, by_key: Mapping[str, Row]) -> str:
    row = by_key.get(LAYER.sub("decoder.layers.{N}.", f"{module}.weight", count=1))
    return "" if row is None else row.formula


def _table(config: Mapping[str, object], where: str) -> tuple[tuple[Row, ...], Sizes]:
    if not config:
        raise Refused(
            "config-missing",
            "there is no config.json beside or above the adapter, and without it fused matrices can't be told apart",
            where=where,
            next="give the model that training began with as --base",
        )
    rows = ROWS.get(str(config.get("model_type")))
    if rows is None:
        what = f"which of its tensors Megatron's are is not known for the model type {show(config.get('model_type'))}"
        raise Refused("megatron-family", what, where=where, expected=", ".join(sorted(ROWS)))
    try:
        return rows, sizes_of(config)
    except SizeError as error:
        raise Refused("megatron-config", f"config.json is not of this model: {error}", where=where) from None


def _place(
    name: str, tensor: LazyTensor, by_key: Mapping[str, Row], sizes: Sizes, wrapped: set[str], found: _Found
) -> None:
    """One tensor under PEFT's names: a factor, or a weight of the model below."""
    match = _FACTOR.fullmatch(name)
    plain = name.replace(".base_layer.", ".").replace(".to_wrap.", ".")
    key = plain if match is None else f"{match['module']}.weight"
    layer = LAYER.match(key)
    number = "" if layer is None else layer[1]
    row = by_key.get(LAYER.sub("decoder.layers.{N}.", key, count=1))
    if row is None or (match is not None and (layer is None or row.formula not in ("same", *_FUSED))):
        found.unknown.append(name)
        return
    try:
        made = parts(row, tensor, sizes) if match is None else _factors(match, row, tensor, sizes)
    except SizeError as error:
        found.misfits[name] = str(error)
        return
    if not made:
        found.unknown.append(name)
    module = key.removesuffix(".weight")
    inner = ".base_layer" if match is None and key.endswith(".weight") and module in wrapped else ""
    for each, part in made.items():
        theirs = each.replace("{N}", number)
        stem, _, leaf = theirs.rpartition(".")
        kind = leaf if match is None else f"{_kind(match)}.default.{leaf}"
        found.tensors[f"{PEFT_PREFIX}{stem}{inner}.{kind}"] = part
        found.keys[f"{PEFT_PREFIX}{stem}{inner}.{kind}"] = name


def _kind(match: re.Match[str]) -> str:
    is_first = match["way"] == "in" or match["letter"] == "A"
    return LORA_PAIR[0] if is_first else LORA_PAIR[1]


def _factors(match: re.Match[str], row: Row, tensor: LazyTensor, sizes: Sizes) -> dict[str, LazyTensor]:
    """A factor for each of the projections that a matrix is made of; none where it is of one that is not there."""
    if match["one"] is not None:
        at = _PARTS.get(match["one"], -1)
        return {row.theirs[at]: tensor} if row.formula in _FUSED and 0 <= at < len(row.theirs) else {}
    if _kind(match) == LORA_PAIR[0]:
        return dict.fromkeys(row.theirs, tensor)
    return parts(row, tensor, sizes)
