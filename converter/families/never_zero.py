"""Which tensors of a model are never zero everywhere once it is trained, by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from converter.core.tensors.dtypes import TensorInfo
from converter.families.words import HEAD_MODULES

LAYERS = re.compile(r"(?:^|\.)(?:weight|in_proj_weight|\w*_proj|w[123])$", re.ASCII)
"""Weights of layers by their names, stacked experts among them; other matrices may be zero by design."""

_FINAL_NORM = re.compile(r"(?:^|\.)(?:norm|final_norm|final_layer_?norm|ln_f)\.weight$", re.ASCII)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)


def is_matrix_of_a_layer(name: str, info: TensorInfo) -> bool:
    """True for a matrix that is not zero by design: no single row or column, no factor of an adapter, no head."""
    shape = info.shape
    if len(shape) < 2 or min(shape) < 2 or not info.dtype.is_float or ".lora_" in name or not LAYERS.search(name):
        return False
    return not set(name.split(".")[:-1]) & set(HEAD_MODULES)


def may_be_norm(name: str, info: TensorInfo) -> bool:
    """True for a weight of one dimension, which a norm's is."""
    return len(info.shape) == 1 and name.endswith(".weight") and info.dtype.is_float


def norms_that_differ(zero: Mapping[str, bool]) -> list[str]:
    """Weights of norms that are zero where others of the kind are not: norms that begin at zero all do.

    Args:
        zero: of each weight that may be a norm's, whether it is zero everywhere.
    """
    places: dict[str, dict[str, bool]] = {}
    for name, is_zero in zero.items():
        is_final = _FINAL_NORM.search(name) is not None and _NUMBER.search(name) is None
        place = "norm" if is_final else _NUMBER.sub("N", name)
        places.setdefault(place, {})[name] = is_zero
    found = [n for held in places.values() if not all(held.values()) for n, is_zero in held.items() if is_zero]
    others = [is_zero for place, held in places.items() if place != "norm" for is_zero in held.values()]
    if others and not any(others):
        found += [n for n, is_zero in places.get("norm", {}).items() if is_zero and n not in found]
    return found


def never_zero(infos: Mapping[str, TensorInfo], zero: Iterable[str]) -> list[str]:
    """Of the tensors that are zero everywhere those that no trained model has so."""
    held = frozenset(zero)
    norms = {n: n in held for n, info in infos.items() if may_be_norm(n, info)}
    matrices = [n for n, info in infos.items() if n in held and is_matrix_of_a_layer(n, info)]
    return [*matrices, *norms_that_differ(norms)]
