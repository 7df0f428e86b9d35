"""BEFT: biases are trained.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/beft/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors import nodes as tensors
from converter.errors import Refused
from converter.text import show


def update(site: Site) -> tuple[Update, ...]:
    """`bias + change`.

    Raises:
        Refused: the change is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the base's layer
            has no bias (`adapter-bias`).
    """
    if "bias" not in site.base:
        what = f"the adapter changes the bias of {show(site.module.name)}, and the base layer has none"
        raise Refused("adapter-bias", what, where=site.where)
    (length,) = site.base["bias"].shape
    change = tensors.reshape(site.shaped("beft_bias", 1, length), (length,))
    return (Update(KERNEL, (change,), site.params("bias", transposed=False), "bias", scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: a bias and its change."""
    from converter.core.compute.updates import added

    return added(inputs, params, lambda bias, factors, params: factors[0])


KERNEL = of_weight("beft-merge", "beft:merged", (0,))

METHOD = Method(
    title="BEFT",
    peft_type="BEFT",
    factors=("beft_bias",),
    fields=fields.of_training(),
    update=update,
    zeros=("beft_bias",),
    kernels=(KERNEL,),
)
