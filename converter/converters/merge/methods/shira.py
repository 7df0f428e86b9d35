"""SHiRA: single elements of the weight are trained.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/shira/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.errors import Refused


def update(site: Site) -> tuple[Update, ...]:
    """The values are added at the positions that the file lists.

    Raises:
        Refused: values or positions are missing (`adapter-incomplete`), or do not fit (`adapter-shape`).
    """
    outputs, inputs = site.linear()
    count = site.field("r") * (outputs + inputs)
    values = site.shaped("shira_weight", count)
    positions = site.shaped("shira_indices", 2, count)
    return (Update(KERNEL, (values, positions), site.params(), scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, the values `[n]` and their rows and columns `[2, n]`."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        values, positions = factors
        shape = weight.shape[::-1] if params["transposed"] else weight.shape
        change = scattered(values, positions.long(), tuple(shape))
        return change.T if params["transposed"] else change

    return added(inputs, params, change)


def scattered(values: Any, positions: Any, shape: tuple[int, ...]) -> Any:
    """Zeros with values added at positions, one row of them for each dimension.

    Raises:
        Refused: a position lies outside (`adapter-shape`).
    """
    import torch

    for along, length in zip(positions, shape, strict=True):
        if len(along) and not 0 <= int(along.min()) <= int(along.max()) < length:
            what = f"the adapter lists a position outside of a weight {list(shape)}"
            raise Refused("adapter-shape", what, got=f"{int(along.min())} to {int(along.max())}")
    return torch.zeros(shape, dtype=values.dtype).index_put_(tuple(positions), values, accumulate=True)


KERNEL = of_weight("shira-merge", "shira:merged")

METHOD = Method(
    title="SHiRA",
    peft_type="SHIRA",
    factors=("shira_weight", "shira_indices"),
    fields={**fields.of_training("mask_type", "random_seed"), "r": fields.count(32)},
    update=update,
    pairs=(("shira_weight", "shira_indices"),),
    zeros=("shira_weight",),
    kernels=(KERNEL,),
)
