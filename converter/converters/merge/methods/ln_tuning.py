"""LN tuning: layer norms trained whole.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/ln_tuning/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.adapter_keys import Module
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_FACTOR = "ln_tuning_layers"


def leaves(module: Module) -> tuple[str, ...]:
    """The tensors that the adapter has of a module."""
    return tuple(_leaf(factor) for factor in module.factors if factor.partition(".")[0] == _FACTOR)


def _leaf(factor: str) -> str:
    return factor.partition(".")[2] or "weight"


def update(site: Site) -> tuple[Update, ...]:
    """The trained tensors take the base's place.

    Raises:
        Refused: one has another shape (`adapter-shape`).
    """
    found = []
    for factor, tensor in site.module.factors.items():
        leaf = _leaf(factor)
        if tensor.info.shape != site.base[leaf].shape:
            raise site.misfit(site.base[leaf].shape, f"{leaf} {list(tensor.info.shape)}")
        found.append(Update(KERNEL, (tensor,), site.params(leaf, transposed=False), leaf))
    return tuple(found)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and what takes its place."""
    from converter.core.compute.updates import replaced

    return replaced(inputs, params, lambda weight, factors, params: factors[0])


KERNEL = of_weight("ln-tuning-merge", "ln_tuning:merged", (0,))

METHOD = Method(
    title="LN tuning",
    peft_type="LN_TUNING",
    factors=(_FACTOR,),
    update=update,
    is_linear=False,
    leaves=leaves,
    kernels=(KERNEL,),
)
