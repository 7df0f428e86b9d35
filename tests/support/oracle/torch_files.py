"""Values to save with torch, and what a reader made of them, evaluated."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import torch

from converter.core.compute.evaluate import Evaluator
from converter.core.files.reading import InputFiles
from converter.core.tensors.nodes import LazyTensor

SAVES: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip-protocol-4": {"pickle_protocol": 4},
    "zip-protocol-5": {"pickle_protocol": 5},
    "old": {"_use_new_zipfile_serialization": False},
    "old-protocol-3": {"_use_new_zipfile_serialization": False, "pickle_protocol": 3},
    "old-protocol-4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32,
    torch.uint64,
]  # fmt: skip


def save(path: Path, value: Any, how: str = "zip") -> Path:
    torch.save(value, path, **SAVES[how])
    return path


def loaded(value: Any) -> Any:
    """A read value with lazy tensors evaluated."""
    if isinstance(value, LazyTensor):
        with InputFiles({}) as files:
            return Evaluator(files).evaluate(value, {})
    if isinstance(value, dict):
        return {k: loaded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(loaded(v) for v in value)
    return value


def values() -> dict[str, Any]:
    torch.manual_seed(0)
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    flat = torch.randn(50).bfloat16()
    return {
        "dtypes": {str(d): torch.arange(7).to(d) for d in DTYPES},
        "shapes": {"none": torch.empty(0), "wide": torch.empty(0, 4), "one": torch.tensor(3.5), "3d": torch.ones(1, 2)},
        "views": [base, base[1], base[1:3], base.t(), base[:, 2:5], base[::2, ::3], base.T[3:, :2]],
        "flat-groups": OrderedDict(a=flat[:20].view(4, 5), b=flat[20:35], c=flat[35:].view(3, 5)),
        "parameters": {"w": torch.nn.Parameter(base.clone()), "f": torch.nn.Parameter(flat, requires_grad=False)},
        "many-parameters": [torch.nn.Parameter(torch.full((i + 1,), float(i))) for i in range(40)],
        "nested": {"lr": 1e-5, "names": ["a", ("b", None, True)], 7: {"x": torch.ones(2)}, "size": torch.Size([2, 3])},
        "counted": {"d": defaultdict(list, a=[1]), "o": OrderedDict([("b", 1), ("a", 2)])},
        "text": {"ключ": "ё \U0001f600", "bytes": b"\x00\xff\x80", "long": "x" * 70_000, "big": 2**100},
        "module": OrderedDict(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()),
    }  # fmt: skip
