"""What of a checkpoint is quantised, from headers and config: its weights, their parts, and what is not whole."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.core.tensors.dtypes import DType
from converter.families.quantised import bitsandbytes, four_bit_floats, mxfp4, packed, scaled
from converter.families.quantised.weight import Fault, Format, Infos, Shape, Weight
from converter.text import fold, show

CONFIG_KEYS = ("quantization_config", "compression_config")
"""The key of config.json, and an older spelling of it."""

FORMATS: Mapping[str, tuple[Format, ...]] = {
    "bitsandbytes": (bitsandbytes.FOUR_BIT, bitsandbytes.INT8),
    "fp8": (scaled.BLOCKS,),
    "compressed-tensors": (packed.PACKED, four_bit_floats.FOUR_BIT_FLOATS, scaled.COMPRESSED),
    "gptq": (packed.GPTQ,),
    "awq": (packed.AWQ,),
    "mxfp4": (mxfp4.MXFP4,),
}
"""Formats by `quant_method`."""

_TITLES = {"fp8": "FP8", "gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ"}

_COMPRESSED_FORMATS = frozenset(
    {
        *("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense", "mixed-precision"),
        *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    }
)
_FOREIGN = ("W_q", "codebooks", "weight_g_idx", "bitmask", "qscale_weight")
"""Last names of tensors that formats have which are not read here."""

NOT_READ: Mapping[str, str] = {
    "torchao": "its tensors are subclasses, with layouts by version",
    "hqq": "many packings, and PEFT itself quantises a merge again",
    "aqlm, eetq, quanto, spqr, vptq, higgs, fp_quant, bitnet": "no reader here",
    "fbgemm_fp8, modelopt, quark": "scales that the config alone describes, or a file beside it",
    "gptq with `dynamic`, `marlin` or `bitblas`; awq but for `gemm`": "other packings under the same names",
    "compressed-tensors with `transform_config` or a sparse format": "rotated or pruned weights",
}
"""Bases that are refused by name, with the reason, for the table of bases; every other method is refused too."""

_CACHE = re.compile(r"\.(?:[kvq]_scale|[kv]_zero_point)$")
"""Scales of a quantised cache, that stand in attention: no weight's."""


@dataclass(frozen=True)
class Quantised:
    """What of a checkpoint is quantised.

    Attributes:
        method: `quant_method` of the config, or what the tensors show; empty where nothing is quantised.
        weights: those that can be made whole, with their formats.
        faults: what looks like a quantised weight and is not whole.
        unsupported: why the method's weights can't be made whole here; empty where they can.
        loose: names of tensors that go with a quantised cache.
    """

    method: str
    weights: tuple[tuple[Weight, Format], ...] = ()
    faults: tuple[Fault, ...] = ()
    unsupported: str = ""
    loose: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The method in users' words."""
        return _TITLES.get(self.method, show(self.method))

    @functools.cached_property
    def schemes(self) -> dict[str, int]:
        """How many weights there are of each scheme."""
        found: dict[str, int] = {}
        for weight, _ in self.weights:
            found[weight.scheme] = found.get(weight.scheme, 0) + 1
        return found

    @property
    def words(self) -> str:
        """How many weights are quantised, and how: `196 NF4, doubly quantised`."""
        return "; ".join(f"{count} {scheme}" for scheme, count in self.schemes.items())


NOTHING = Quantised("")


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of config.json that says how weights are quantised: at its top, or in the language model's part."""
    for held in (config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, Mapping))):
        for key in CONFIG_KEYS:
            found = held.get(key)
            if isinstance(found, Mapping) and found:
                return found
    return None


def read(infos: Infos, config: Mapping[str, Any]) -> Quantised:
    """What is quantised among tensors with these names, types and shapes."""
    held = quantization_config(config)
    method = _method(held) if held is not None else _shown(infos)
    if not method:
        return NOTHING
    own = held or {}
    formats = FORMATS.get(method, ())
    found = [(each, f) for f in formats for each in f.find(infos, own)]
    weights = tuple((each, f) for each, f in found if isinstance(each, Weight))
    parts = {p for w, _ in weights for p in w.parts.values()}
    faults = _once(f for f, _ in found if isinstance(f, Fault) and f.tensor not in parts)
    faults += tuple(
        Fault(w.name, f"{show(w.name)} is there whole, and quantised beside it")
        for w, _ in weights
        if w.name in infos and w.name not in w.parts.values()
    )
    loose = tuple(n for n in infos if n not in parts and _CACHE.search(n)) if method == "compressed-tensors" else ()
    unsupported = _unsupported(method, own, infos)
    return Quantised(method, weights, () if unsupported else faults, unsupported, loose)


def _once(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    return tuple({f.tensor: f for f in faults}.values())


def _method(held: Mapping[str, Any]) -> str:
    """`quant_method`; older configs of bitsandbytes have none."""
    method = held.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower().replace("_", "-") if method.lower().startswith("compressed") else method.lower()
    return "bitsandbytes" if held.get("load_in_4bit") or held.get("load_in_8bit") else "unknown"


def _shown(infos: Infos) -> str:
    """The method that tensors show where the config says nothing: types and names that only it has."""
    for name, info in infos.items():
        if ".quant_state.bitsandbytes__" in name or name.endswith(".SCB"):
            return "bitsandbytes"
        if info.dtype is DType.F8_E4M3:
            is_inverse = f"{name.removesuffix('.weight')}.weight_scale" not in infos
            return "fp8" if is_inverse else "unknown"
        if name.endswith("_blocks") and info.dtype is DType.U8:
            return "mxfp4"
        if name.endswith(".qweight"):
            return "unknown"
    return ""


def _unsupported(method: str, held: Mapping[str, Any], infos: Infos) -> str:
    """Why weights of a method are not made whole here."""
    if method not in FORMATS:
        title = _TITLES.get(method, show(method))
        return (
            "the method of its weights is not recorded" if method == "unknown" else f"{title} is not dequantised here"
        )
    foreign = next((n for n in infos if n.endswith(tuple(f".{f}" for f in _FOREIGN))), None)
    if foreign is not None:
        return f"{show(foreign)} is of a format that is not dequantised here"
    if method == "gptq":
        kind = held.get("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            return f"GPTQ's checkpoint_format {show(kind)} is not dequantised here"
        return "GPTQ with `dynamic` bits is not dequantised here" if held.get("dynamic") else ""
    if method == "awq":
        version = str(held.get("version", "gemm")).lower()
        backend = str(held.get("backend", "autoawq")).lower()
        is_gemm = version == "gemm" and backend == "autoawq" and held.get("zero_point", True) is True
        return "" if is_gemm else f"AWQ of version {show(version)}, backend {show(backend)} is not dequantised here"
    return _unsupported_compressed(held) if method == "compressed-tensors" else ""


def _unsupported_compressed(held: Mapping[str, Any]) -> str:
    groups = held.get("config_groups")
    named = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    kinds = {str(g["format"]) for g in named if g.get("format")} or {str(held.get("format", "dense"))}
    if others := sorted(kinds - _COMPRESSED_FORMATS):
        return f"compressed-tensors' format {show(others[0])} is not dequantised here"
    if held.get("transform_config"):
        return "compressed-tensors with a transform_config (rotated weights) is not dequantised here"
    sparse = held.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        return f"compressed-tensors' sparse format {show(sparse['format'])} is not dequantised here"
    return ""


_LEAST_ALIKE = 3
"""A part of another type is the odd one where so many, and most, are of one type."""


def odd_types(found: Quantised, infos: Infos) -> dict[tuple[str, ...], str]:
    """Parts of a type that the same parts of nearly all other weights do not have: somebody cast them; in words."""
    kinds: dict[tuple[str, str], dict[str, DType]] = {}
    for weight, _ in found.weights:
        for part, name in weight.parts.items():
            kinds.setdefault((weight.scheme, part), {})[name] = infos[name].dtype
    said: dict[tuple[str, ...], str] = {}
    for held in kinds.values():
        (usual, count), *others = Counter(held.values()).most_common()
        if others and count >= _LEAST_ALIKE and 2 * count > len(held):
            odd = tuple(n for n, dtype in held.items() if dtype is not usual)
            types = " and ".join(sorted({held[n].value for n in odd}))
            said[odd] = f"{fold(odd)} is {types}, and such parts of {count} other weights are {usual.value}"
    return said


def plain_shapes(infos: Infos, config: Mapping[str, Any], asked: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes by name, each quantised weight as what it is once it is whole.

    Args:
        asked: shapes that the model's class asks for: of weights whose parts do not record their shape.
    """
    shapes = {n: i.shape for n, i in infos.items()}
    found = read(infos, config)
    if not found.method:
        return shapes
    for weight, _ in found.weights:
        for part in weight.parts.values():
            shapes.pop(part, None)
        wanted = asked.get(weight.name)
        unrecorded = wanted if wanted is not None and weight.fits(wanted) else (weight.elements[1],)
        shapes[weight.name] = weight.shape or unrecorded
    for name in found.loose:
        shapes.pop(name, None)
    return shapes
