"""A quantised checkpoint as if every weight were whole, and back again where a weight did not change.

Steps see whole weights under the names that the model's class asks for. A weight that a step leaves alone is written
as it lies, with `quantization_config`; one that changes is whole, and then all of them are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.converters.merge.orientation import is_conv1d
from converter.converters.merge.quantised.full_precision import full_precision_of
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.byte_runs import reads
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.errors import ConvertError, Refused
from converter.families.quantised.reading import CONFIG_KEYS, Quantised, odd_types, read
from converter.families.quantised.weight import Weight
from converter.text import fold, show

_HALVES = (DType.BF16, DType.F16)


def found_in(checkpoint: Checkpoint) -> Quantised:
    """What of a checkpoint is quantised, by its headers and config."""
    return read({n: t.info for n, t in checkpoint.tensors.items()}, checkpoint.config)


def expect_parts(found: Quantised, where: str) -> None:
    """Every quantised weight has its parts, of shapes that go together.

    Raises:
        Refused: one has not (`quantised-incomplete`).
    """
    if found.faults:
        more = f", and {len(found.faults) - 1} more" if len(found.faults) > 1 else ""
        what = f"{found.faults[0].text}{more}: without it the rest is noise"
        raise Refused("quantised-incomplete", what, where=where, next="get the file again, from where it was made")


def model_dtype(checkpoint: Checkpoint) -> DType:
    """The dtype that the model computes in: what config.json says, else that of its whole weights, else bf16."""
    parts = [checkpoint.config, *(v for v in checkpoint.config.values() if isinstance(v, Mapping))]
    for held in parts:
        for key in ("dtype", "torch_dtype"):
            try:
                said = DType.parse(str(held[key]))
            except (KeyError, ConvertError):
                continue
            if said in (*_HALVES, DType.F32):
                return said
    counts = {d: sum(t.info.dtype is d for t in checkpoint.tensors.values()) for d in _HALVES}
    return DType.F16 if counts[DType.F16] > counts[DType.BF16] else DType.BF16


@dataclass(frozen=True)
class Whole:
    """A quantised checkpoint with every weight whole.

    Attributes:
        before: as it lies.
        found: what of it is quantised.
        after: with whole weights, without `quantization_config`.
    """

    before: Checkpoint
    found: Quantised
    after: Checkpoint

    def changed(self, result: Checkpoint) -> list[str]:
        """Names of the quantised weights that a step changed, dropped or renamed."""
        return [
            w.name
            for w, _ in self.found.weights
            if w.name not in result.dropped and result.tensors.get(w.name) is not self.after.tensors[w.name]
        ]

    def as_it_lay(self, result: Checkpoint, made: Mapping[str, LazyTensor] | None = None) -> Checkpoint:
        """What steps made of `after`, with the parts of every quantised weight in its place, and the config's word.

        Args:
            made: parts that are others than they were.
        """
        parts = {w.name: tuple(w.parts.values()) for w, _ in self.found.weights}
        tensors: dict[str, LazyTensor] = {}
        shards: dict[str, str] = {}
        for name, tensor in result.tensors.items():
            for each in parts.get(name, (name,)):
                tensors[each] = {**self.before.tensors, **(made or {})}[each] if name in parts else tensor
                file = self.before.shards.get(each) if name in parts else result.shards.get(name)
                shards |= {each: file} if file is not None else {}
        left = {p: result.dropped[n] for n, held in parts.items() if n in result.dropped for p in held}
        loose = {n: self.before.tensors[n] for n in self.found.loose}
        shards |= {n: self.before.shards[n] for n in loose if n in self.before.shards}
        same = result.config == self.after.config
        config = self.before.config if same else _with_keys(result.config, self.before.config)
        dropped = {n: why for n, why in result.dropped.items() if n not in self.after.dropped}
        out = result.replace(
            tensors=_in_order({**tensors, **loose}, self.before),
            shards=shards,
            config=config,
            dropped={**dropped, **self.before.dropped, **left},
        )
        return out.replace(config_bytes=self.before.config_bytes) if same else out


def _in_order(tensors: Mapping[str, LazyTensor], before: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors in the order that they lay in, then the added ones."""
    old = {n: tensors[n] for n in before.tensors if n in tensors}
    return old | {n: t for n, t in tensors.items() if n not in old}


def _with_keys(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what another says of quantised weights."""
    out = {**config, **{k: before[k] for k in CONFIG_KEYS if k in before}}
    for key, part in before.items():
        if isinstance(part, Mapping) and isinstance(out.get(key), Mapping) and key not in CONFIG_KEYS:
            out[key] = _with_keys(out[key], part)
    return out


def without_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of quantised weights, in its parts too."""
    return {k: without_keys(v) if isinstance(v, Mapping) else v for k, v in config.items() if k not in CONFIG_KEYS}


def whole(checkpoint: Checkpoint, found: Quantised, context: Context) -> Whole:
    """Every quantised weight whole, in the model's dtype. Reads no more than what says how the weights are laid out.

    Raises:
        Refused: a part is missing or does not fit (`quantised-incomplete`), or the format is not read
            (`quantised-unsupported`), or parts were cast (`quantised-incomplete`), without consent.
    """
    where = show(checkpoint.origin.asked)
    expect_parts(found, where)
    if found.unsupported:
        made_of = full_precision_of(checkpoint)
        model = f"take {show(made_of)}, which" if made_of else "take the full-precision model that"
        way = f"{model} it was made from; or save it whole with the library that quantised it"
        raise Refused("quantised-unsupported", found.unsupported, where=where, next=way)
    _expect_read_here(checkpoint, found, where)
    for text in odd_types(found, {n: t.info for n, t in checkpoint.tensors.items()}).values():
        what = f"{text}: a cast of it has lost what it scales"
        context.consent(
            Refused("quantised-incomplete", what, where=where, next="get the file again, from where it was made")
        )
    dtype = model_dtype(checkpoint)
    made: dict[str, tuple[Weight, LazyTensor]] = {}
    for weight, form in found.weights:
        held = {part: checkpoint.tensors[name] for part, name in weight.parts.items()}
        try:
            made[weight.main] = weight, form.whole(weight, held, dtype, context)
        except Refused as error:
            error.where = error.where or where
            raise
    names = {p: w.name for w, _ in found.weights for p in w.parts.values()}
    tensors: dict[str, LazyTensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        if (name in names and name not in made) or name in found.loose:
            continue
        new, value = (made[name][0].name, made[name][1]) if name in made else (name, tensor)
        tensors[new] = value
        shards |= {new: checkpoint.shards[name]} if name in checkpoint.shards else {}
    read = {p for w, v in made.values() for p in w.parts.values() if _reads(checkpoint.tensors[p], v)}
    unused = {p: f"says how {show(n)} was quantised" for p, n in names.items() if p not in read}
    unused |= dict.fromkeys(found.loose, "a scale of a quantised cache")
    after = checkpoint.replace(
        tensors=tensors,
        shards=shards,
        config=without_keys(checkpoint.config),
        dropped={**checkpoint.dropped, **unused},
    )
    return Whole(checkpoint, found, after)


def _reads(part: LazyTensor, value: LazyTensor) -> bool:
    used = {(r.file, r.offset) for r in reads(value)}
    return any((r.file, r.offset) in used for r in reads(part))


def _expect_read_here(checkpoint: Checkpoint, found: Quantised, where: str) -> None:
    """Weights whose dequantised values are known.

    Raises:
        Refused: a Conv1D, which bitsandbytes transposes before it quantises it (`quantised-unsupported`).
    """
    if found.method == "bitsandbytes":
        turned = [w.name for w, _ in found.weights if is_conv1d(w.name, checkpoint.config)]
        if turned:
            what = f"{fold(turned)} is a Conv1D, which bitsandbytes transposes and transformers does not turn back"
            raise Refused("quantised-unsupported", what, where=where)
