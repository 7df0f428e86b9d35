"""UniLoRA: every element of both LoRA matrices is an element of one vector.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/unilora/layer.py and model.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.errors import Refused

_NAMES = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")


def _saved(value: Any, key: str, where: str) -> bool:
    """True; indices that were not saved are drawn by the order of the model's layers, which no file holds."""
    if value is not True:
        what = f"`{key}` is not set: which elements a layer has depends on the order of the model's layers"
        raise Refused("adapter-field-unsupported", what, where=where, facts={"field": key})
    return True


def update(site: Site) -> tuple[Update, ...]:
    """`W + B @ A`, with `A = theta[i] * scale`, and B likewise.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    rank, first = site.field("r"), site.take(_NAMES[0])
    site.expect_rank(rank, first.info.shape[0] if first.info.shape else 0)
    theta = site.fitting("unilora_theta_d", site.common("unilora_theta_d"), site.field("theta_d_length"))
    sizes = ((rank, inputs), (outputs, rank)) * 2
    factors = [site.shaped(name, *size) for name, size in zip(_NAMES, sizes, strict=True)]
    return (Update(KERNEL, (theta, *factors), site.params(), scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, the vector, and for A and B which element each is and what it is multiplied by."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        theta, at_a, at_b, scale_a, scale_b = factors
        for places in (at_a, at_b):
            if not 0 <= int(places.min()) <= int(places.max()) < len(theta):
                what = f"the adapter lists an element that its vector of {len(theta)} has not"
                raise Refused("adapter-shape", what, got=f"{int(places.min())} to {int(places.max())}")
        product = (theta[at_b.long()] * scale_b) @ (theta[at_a.long()] * scale_a)
        return product.T if params["transposed"] else product

    return added(inputs, params, change)


KERNEL = of_weight("unilora-merge", "unilora:merged")

METHOD = Method(
    title="UniLoRA",
    peft_type="UNILORA",
    factors=_NAMES,
    fields={
        **fields.of_training("proj_seed", "unilora_dropout", "init_theta_d_bound", only="unilora_only"),
        "r": fields.count(4),
        "theta_d_length": fields.count(256),
        "save_indices": fields.Field(_saved),
    },
    update=update,
    shared=("unilora_theta_d",),
    is_linear=False,
    kernels=(KERNEL,),
)
