"""Streaming, verified conversion of RLHF checkpoints.

The public names are loaded when they are first used, so that `import converter` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from converter.version import __version__

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint, Input, Origin, SideFile
    from converter.core.compute.evaluate import to_torch
    from converter.core.context import Context, Note
    from converter.core.tensors.dtypes import DType, TensorInfo
    from converter.core.tensors.kernel_specs import KernelSpec
    from converter.core.writer.plan import Plan, make_plan
    from converter.core.writer.write import write
    from converter.errors import ConvertError, Refused, UsageError, VerificationFailed
    from converter.recipe.recipe import Recipe, load_recipe
    from converter.recipe.verbs.load import Loaded, load
    from converter.recipe.verbs.open import open
    from converter.sources.moments import adam_moments


_HOME = {
    "Checkpoint": "core.checkpoint",
    "Context": "core.context",
    "ConvertError": "errors",
    "DType": "core.tensors.dtypes",
    "Input": "core.checkpoint",
    "KernelSpec": "core.tensors.kernel_specs",
    "Note": "core.context",
    "Origin": "core.checkpoint",
    "Plan": "core.writer.plan",
    "Recipe": "recipe.recipe",
    "Refused": "errors",
    "SideFile": "core.checkpoint",
    "TensorInfo": "core.tensors.dtypes",
    "UsageError": "errors",
    "VerificationFailed": "errors",
    "adam_moments": "sources.moments",
    "Loaded": "recipe.verbs.load",
    "load": "recipe.verbs.load",
    "load_recipe": "recipe.recipe",
    "open": "recipe.verbs.open",
    "make_plan": "core.writer.plan",
    "to_torch": "core.compute.evaluate",
    "write": "core.writer.write",
}

__all__ = [
    "Checkpoint",
    "Context",
    "ConvertError",
    "DType",
    "Input",
    "KernelSpec",
    "Loaded",
    "Note",
    "Origin",
    "Plan",
    "Recipe",
    "Refused",
    "SideFile",
    "TensorInfo",
    "UsageError",
    "VerificationFailed",
    "__version__",
    "adam_moments",
    "load",
    "load_recipe",
    "make_plan",
    "open",
    "to_torch",
    "write",
]


def __getattr__(name: str) -> object:
    """Loads a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return __all__
