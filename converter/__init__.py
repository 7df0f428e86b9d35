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
    from converter.core.writer.on_ray import RayExecutor
    from converter.core.writer.plan import Plan, make_plan
    from converter.core.writer.write import Receipt
    from converter.errors import ConvertError, Interrupted, Refused, UsageError, VerificationFailed
    from converter.examine.diagnoses.case import Finding
    from converter.examine.doctor import Report
    from converter.examine.verify.verify import Verified
    from converter.recipe.progress import progress
    from converter.recipe.recipe import Recipe, load_recipe
    from converter.recipe.verbs.adapters import convert_lora, extract_lora, prune_lora
    from converter.recipe.verbs.average import average, interpolate
    from converter.recipe.verbs.check import check
    from converter.recipe.verbs.conversion import Conversion
    from converter.recipe.verbs.convert import Converted, convert, critic_to_rm, rm_to_critic
    from converter.recipe.verbs.delta import apply_delta, make_delta
    from converter.recipe.verbs.diff import Compared, diff
    from converter.recipe.verbs.doctor import doctor
    from converter.recipe.verbs.explain import Explanation, Messages, explain
    from converter.recipe.verbs.gather import Gathered, gather
    from converter.recipe.verbs.inspect import Inspection, inspect
    from converter.recipe.verbs.load import Loaded, load
    from converter.recipe.verbs.merge import merge_lora
    from converter.recipe.verbs.open import open
    from converter.recipe.verbs.push import Push, push
    from converter.recipe.verbs.repair import Repaired, Sound, repair
    from converter.recipe.verbs.reshard import reshard
    from converter.recipe.verbs.reshard_state import ReshardedState, reshard_state
    from converter.recipe.verbs.run import plan, run, write
    from converter.recipe.verbs.verify import verify
    from converter.recipe.verbs.watch import Examined, watch
    from converter.sources.moments import adam_moments


_HOME = {
    "Checkpoint": "core.checkpoint",
    "Compared": "recipe.verbs.diff",
    "Context": "core.context",
    "Conversion": "recipe.verbs.conversion",
    "ConvertError": "errors",
    "Converted": "recipe.verbs.convert",
    "DType": "core.tensors.dtypes",
    "Examined": "recipe.verbs.watch",
    "Explanation": "recipe.verbs.explain",
    "Finding": "examine.diagnoses.case",
    "Gathered": "recipe.verbs.gather",
    "Input": "core.checkpoint",
    "Inspection": "recipe.verbs.inspect",
    "Interrupted": "errors",
    "KernelSpec": "core.tensors.kernel_specs",
    "Loaded": "recipe.verbs.load",
    "Messages": "recipe.verbs.explain",
    "Note": "core.context",
    "Origin": "core.checkpoint",
    "Plan": "core.writer.plan",
    "Push": "recipe.verbs.push",
    "RayExecutor": "core.writer.on_ray",
    "Receipt": "core.writer.write",
    "Recipe": "recipe.recipe",
    "Refused": "errors",
    "Repaired": "recipe.verbs.repair",
    "Report": "examine.doctor",
    "ReshardedState": "recipe.verbs.reshard_state",
    "SideFile": "core.checkpoint",
    "Sound": "recipe.verbs.repair",
    "TensorInfo": "core.tensors.dtypes",
    "UsageError": "errors",
    "VerificationFailed": "errors",
    "Verified": "examine.verify.verify",
    "adam_moments": "sources.moments",
    "apply_delta": "recipe.verbs.delta",
    "average": "recipe.verbs.average",
    "check": "recipe.verbs.check",
    "convert": "recipe.verbs.convert",
    "convert_lora": "recipe.verbs.adapters",
    "critic_to_rm": "recipe.verbs.convert",
    "diff": "recipe.verbs.diff",
    "doctor": "recipe.verbs.doctor",
    "explain": "recipe.verbs.explain",
    "extract_lora": "recipe.verbs.adapters",
    "gather": "recipe.verbs.gather",
    "inspect": "recipe.verbs.inspect",
    "interpolate": "recipe.verbs.average",
    "load": "recipe.verbs.load",
    "load_recipe": "recipe.recipe",
    "make_delta": "recipe.verbs.delta",
    "make_plan": "core.writer.plan",
    "merge_lora": "recipe.verbs.merge",
    "open": "recipe.verbs.open",
    "plan": "recipe.verbs.run",
    "progress": "recipe.progress",
    "prune_lora": "recipe.verbs.adapters",
    "push": "recipe.verbs.push",
    "repair": "recipe.verbs.repair",
    "reshard": "recipe.verbs.reshard",
    "reshard_state": "recipe.verbs.reshard_state",
    "rm_to_critic": "recipe.verbs.convert",
    "run": "recipe.verbs.run",
    "to_torch": "core.compute.evaluate",
    "verify": "recipe.verbs.verify",
    "watch": "recipe.verbs.watch",
    "write": "recipe.verbs.run",
}

__all__ = [
    "Checkpoint",
    "Compared",
    "Context",
    "Conversion",
    "ConvertError",
    "Converted",
    "DType",
    "Examined",
    "Explanation",
    "Finding",
    "Gathered",
    "Input",
    "Inspection",
    "Interrupted",
    "KernelSpec",
    "Loaded",
    "Messages",
    "Note",
    "Origin",
    "Plan",
    "Push",
    "RayExecutor",
    "Receipt",
    "Recipe",
    "Refused",
    "Repaired",
    "Report",
    "ReshardedState",
    "SideFile",
    "Sound",
    "TensorInfo",
    "UsageError",
    "VerificationFailed",
    "Verified",
    "__version__",
    "adam_moments",
    "apply_delta",
    "average",
    "check",
    "convert",
    "convert_lora",
    "critic_to_rm",
    "diff",
    "doctor",
    "explain",
    "extract_lora",
    "gather",
    "inspect",
    "interpolate",
    "load",
    "load_recipe",
    "make_delta",
    "make_plan",
    "merge_lora",
    "open",
    "plan",
    "progress",
    "prune_lora",
    "push",
    "repair",
    "reshard",
    "reshard_state",
    "rm_to_critic",
    "run",
    "to_torch",
    "verify",
    "watch",
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
