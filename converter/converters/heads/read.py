"""Any dialect, read: the head into the one form, the backbone under transformers' own names. No value is touched."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.converters.heads.detect import SPARE_FILE
from converter.converters.heads.model import Head, Linear, Mlp, Normaliser, Reading, resolve
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import Cast, Concat, Filled, LazyTensor
from converter.diagnostic import Command, Steps
from converter.dialects.spec import Dialect
from converter.errors import Refused
from converter.families.family import Family, family, hidden_size
from converter.families.words import OUTPUT_PREFIXES
from converter.text import fold, show

_FIRST_BLOCKS = ("layers.0.", "h.0.", "blocks.0.", "decoder.layers.0.")
"""How a decoder's blocks are named in a backbone that was saved on its own."""

_FORMATS = {DType.F32: "f", DType.F64: "d", DType.F16: "e", DType.I64: "q"}


def read(checkpoint: Checkpoint, dialect: Dialect, context: Context) -> Reading:
    """A checkpoint in a dialect, its head apart from its backbone.

    Raises:
        Refused: the dialect isn't read (`dialect-refused`), its names are not all there (`head-missing`), or they
            have shapes that no such head has (`head-shape`, `head-reshaped`, `head-is-blocks`).
    """
    where = show(checkpoint.origin.asked)
    if dialect.refused:
        raise Refused("dialect-refused", f"{dialect.about}: {dialect.refused}", where=where)
    kind = family(checkpoint.config)
    return _Reader(checkpoint, dialect, kind, context, where).result()


@dataclass
class _Reader:
    source: Checkpoint
    dialect: Dialect
    kind: Family
    context: Context
    where: str
    stored: dict[str, LazyTensor] = field(default_factory=dict)

    def result(self) -> Reading:
        head = self._head()
        normaliser = self._normaliser()
        shard = next((self.source.shards[n] for n in self.stored if n in self.source.shards), None)
        position = next((i for i, n in enumerate(self.source.tensors) if n in self.stored), None)
        return Reading(self.dialect, self.kind, self._backbone(), head, normaliser, shard, position, self.stored)

    # The head

    def _head(self) -> Head | None:
        spec = self.dialect.head
        if spec.kind == "none":
            return None
        if spec.kind == "lm-row":
            weight = self.source.tensors.get("lm_head.weight")
            if weight is None:
                raise self._missing("lm_head.weight")
            return Linear(tensors.narrow(weight, 0, 0, 1))
        stem = resolve(spec.stem, self.kind, self.source.config)
        if spec.kind == "mlp":
            return self._mlp(stem)
        return self._linear(stem)

    def _linear(self, stem: str) -> Linear:
        weight = self._take(stem, "weight")
        if weight is None:
            raise self._missing(f"{stem}.weight")
        bias = self._take(stem, "bias")
        if bias is None and self.dialect.head.bias == "always" and not self.dialect.head.bias_from_zero:
            raise self._missing(f"{stem}.bias")
        return _checked(Linear(self._shaped(weight, stem), bias), stem, self.where)

    def _shaped(self, weight: LazyTensor, stem: str) -> LazyTensor:
        """The weight as `[n, h]`; a leftover of a sharded layout with as many values is one row, with consent."""
        hidden = hidden_size(self.source.config)
        shape = weight.info.shape
        if hidden is None or (len(shape) == 2 and shape[1] == hidden):
            return weight
        what = f"{show(stem)}.weight is {list(shape)}, and the hidden size is {hidden}"
        if weight.info.numel != hidden:
            raise Refused("head-shape", what, where=self.where, expected=f"[n, {hidden}]")
        text = f"{what}: a leftover of a sharded layout, whose order of values no file tells; row by row is likely"
        self.context.consent(Refused("head-reshaped", text, where=self.where, expected=f"[1, {hidden}]"))
        return tensors.reshape(weight, (1, hidden))

    def _mlp(self, stem: str) -> Mlp:
        blocks = [n for n in self.source.tensors if n.startswith(f"{stem}.") and n.count(".") > stem.count(".") + 2]
        if blocks:
            what = f"the head is a branch of the model's own blocks ({fold(blocks)}), not a layer on top of it"
            raise Refused("head-is-blocks", what, where=self.where)
        layers = []
        for number in (0, 2):
            weight, bias = self._take(f"{stem}.{number}", "weight"), self._take(f"{stem}.{number}", "bias")
            if weight is None or bias is None:
                raise self._missing(f"{stem}.{number}.{'weight' if weight is None else 'bias'}")
            layers.append(_checked(Linear(weight, bias), f"{stem}.{number}", self.where))
        deeper = [n for n in self.source.tensors if n.startswith(f"{stem}.") and n not in self.stored]
        if deeper:
            what = f"the head has more than one hidden layer: {fold(deeper)}"
            raise Refused("head-not-linear", what, where=self.where)
        if layers[1].weight.info.shape[1] != layers[0].rows:
            raise Refused("head-shape", f"the two layers of {show(stem)} don't fit together", where=self.where)
        return Mlp(layers[0], layers[1])

    def _take(self, stem: str, leaf: str) -> LazyTensor | None:
        """One tensor of the head, from the file that the loader would read it from."""
        spec = self.dialect.head
        inner = stem if spec.stem_in_file is None else spec.stem_in_file
        wanted = f"{inner}.{leaf}" if inner else leaf
        files = [f for f in (spec.file, *spec.files) if f is not None and f in self.source.beside]
        for name, file in ((wanted, files[0] if files else None), (f"{stem}.{leaf}", SPARE_FILE)):
            tensor = self.source.beside.get(file, {}).get(name) if file is not None else None
            if tensor is not None:
                self.stored[f"{file}:{name}"] = tensor
                return tensor
        name = f"{stem}.{leaf}"
        if name in self.source.tensors and spec.file is None:
            self.stored[name] = self.source.tensors[name]
            return self.source.tensors[name]
        return None

    def _missing(self, name: str) -> Refused:
        return Refused(
            "head-missing",
            f"as {self.dialect.name} the head is {show(name)}, which isn't there",
            where=self.where,
            next=Steps("name another dialect with --from; all are listed by ", Command("list")),
        )

    # What is done to the score

    def _normaliser(self) -> Normaliser | None:
        config = self.source.config
        if self.dialect.normaliser == "mean-std" and ("mean" in config or "std" in config):
            mean, std = _numbers(config.get("mean")), _numbers(config.get("std"))
            return self._checked_normaliser(mean, std, "mean and std of config.json")
        kind = config.get("score_type", "reward")
        if self.dialect.normaliser == "mean-var" and config.get("do_normalize") and kind != "critic":
            # safe-rlhf normalises rewards; of costs it keeps the mean, and critics it leaves as they are.
            mean, var, keys = self._buffers()
            mean = None if mean is None else (0.0,) * len(mean) if kind == "cost" else mean
            std = None if var is None else tuple(math.sqrt(v) if v >= 0 else math.nan for v in var)
            return self._checked_normaliser(mean, std, keys)
        return None

    def _buffers(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, str]:
        found = [self.source.tensors.get(f"normalizer.{n}") for n in ("mean", "var")]
        if found[0] is None or found[1] is None:
            return _numbers(self.source.config.get("mean")), _numbers(self.source.config.get("var")), "mean and var"
        mean, var = (values(t, self.context) for t in found if t is not None)
        return mean, var, "normalizer.mean and normalizer.var"

    def _checked_normaliser(
        self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, keys: str
    ) -> Normaliser | None:
        if mean is None or std is None or len(mean) != len(std) or not all(map(math.isfinite, (*mean, *std))):
            what = f"{keys} are not one finite number each: the loader would fail on them, or score nonsense"
            raise Refused("normaliser", what, where=self.where, next="take both keys out of config.json, or set both")
        if any(s <= 0 for s in std):
            raise Refused("normaliser", f"{keys}: a standard deviation of {min(std)}", where=self.where)
        if all(m == 0 for m in mean) and all(s == 1 for s in std):
            return None
        return Normaliser(mean, std, keys)

    # The backbone

    def _backbone(self) -> Checkpoint:
        """Everything else under transformers' names."""
        extras = {n: why for n in self.source.tensors for start, why in self.dialect.extras if n.startswith(start)}
        kept = {n: t for n, t in self.source.tensors.items() if n not in self.stored and n not in extras}
        names = {n: self._canonical(n) for n in kept}
        names = self._with_prefix(names)
        taken = self._read_files()
        beside = {f: files for f, files in self.source.beside.items() if f not in taken}
        ignored = {
            f"{f}:{n}": "the loader ignores this file beside the other"
            for f, files in self.source.beside.items()
            for n in files
            if f in taken and f"{f}:{n}" not in self.stored
        }
        found = self.source.replace(
            tensors=kept,
            shards={n: f for n, f in self.source.shards.items() if n in kept},
            ties=(),
            beside=beside,
            container="safetensors",
            subfolder="",
            dropped={**self.source.dropped, **extras, **ignored},
        )
        return found.rename({n: new for n, new in names.items() if n != new})

    def _read_files(self) -> set[str]:
        """Files beside that are used up: the head's own, and those that the loader ignores beside it."""
        spec = self.dialect.head
        return {*(f for f in (spec.file, *spec.files) if f is not None), SPARE_FILE}

    def _canonical(self, name: str) -> str:
        if self.dialect.backbone == "{P}":
            return name
        prefix = resolve(self.dialect.backbone, self.kind, self.source.config)
        if name.startswith(prefix):
            return resolve("{P}", self.kind, self.source.config) + name.removeprefix(prefix)
        return name.removeprefix(self.dialect.outer)

    def _with_prefix(self, names: Mapping[str, str]) -> dict[str, str]:
        """A backbone that was saved on its own has no prefix; beside a head it needs one."""
        prefix = self.kind.prefix
        if prefix is None or not any(n.startswith(_FIRST_BLOCKS) for n in names.values()):
            return dict(names)
        return {old: new if new.startswith(OUTPUT_PREFIXES) else prefix + new for old, new in names.items()}


def _checked(layer: Linear, stem: str, where: str) -> Linear:
    shape = layer.weight.info.shape
    if len(shape) != 2 or (layer.bias is not None and layer.bias.info.shape != shape[:1]):
        got = [list(t.info.shape) for t in (layer.weight, layer.bias) if t is not None]
        what = f"{show(stem)} is not a linear layer"
        raise Refused("head-shape", what, where=where, expected="weight [n, h] and bias [n]", got=str(got))
    return layer


def _numbers(value: Any) -> tuple[float, ...] | None:
    """A number, or a list of them, as a tuple."""
    listed = value if isinstance(value, list) else [value]
    if not listed or any(isinstance(v, bool) or not isinstance(v, int | float) for v in listed):
        return None
    return tuple(float(v) for v in listed)


def values(tensor: LazyTensor, context: Context) -> tuple[float, ...]:
    """The numbers of a small tensor that is stored, or written down by a step before.

    Raises:
        Refused: of a dtype that isn't a plain float (`head-dtype`), or computed (`read-computed`).
    """
    match tensor:
        case Filled():
            return (float(tensor.value),) * tensor.info.numel
        case Concat() if tensor.dim == 0 or tensor.info.shape[0] == 1:
            return tuple(v for part in tensor.parts for v in values(part, context))
        case Cast() if tensor.source.info.dtype.is_float:
            return tuple(_rounded(v, tensor.info.dtype) for v in values(tensor.source, context))
    raw = context.read(tensor)
    dtype = tensor.info.dtype
    if dtype is DType.BF16:
        wide = bytearray(2 * len(raw))
        wide[2::4], wide[3::4] = raw[::2], raw[1::2]
        return struct.unpack(f"<{len(raw) // 2}f", wide)
    if dtype not in _FORMATS:
        raise Refused("head-dtype", f"numbers of dtype {dtype.value} in a head are not read")
    form = _FORMATS[dtype]
    return tuple(map(float, struct.unpack(f"<{len(raw) // struct.calcsize(form)}{form}", raw)))


def _rounded(value: float, dtype: DType) -> float:
    """The nearest number of a dtype, ties to even."""
    if not math.isfinite(value):
        return value
    try:
        if dtype is not DType.BF16:
            return float(struct.unpack(f"<{_FORMATS[dtype]}", struct.pack(f"<{_FORMATS[dtype]}", value))[0])
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
    except OverflowError:
        return math.copysign(math.inf, value)
    except KeyError:
        raise Refused("head-dtype", f"numbers of dtype {dtype.value} in a head are not read") from None
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])
