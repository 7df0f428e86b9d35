"""HRA: inputs reflected by a chain of trained Householder reflections.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/hra/layer.py
"""

from __future__ import annotations

import math
from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos
from converter.errors import Refused
from converter.text import show


def update(site: Site) -> tuple[Update, ...]:
    """`W @ prod(I - 2 u u^T)` over the columns of U; made orthogonal first where `apply_GS` is set.

    Raises:
        Refused: U is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`); there are more vectors than inputs, made orthogonal (`adapter-ambiguous`).
    """
    u, rank = site.take("hra_u"), site.field("r")
    site.expect_rank(rank, u.info.shape[-1] if u.info.shape else 0)
    if site.field("apply_GS") and rank > site.sides[1]:
        what = (
            f"{show(site.module.name)} has {site.sides[1]} inputs, and {rank} vectors of them are made orthogonal: "
            "those beyond are rounding alone, which no two programs share"
        )
        raise Refused("adapter-ambiguous", what, where=site.where)
    if site.is_turned:
        raise site.misfit(site.base["weight"].shape, "factors of HRA, which has none for such layers")
    factor = site.fitting("hra_u", u, site.sides[1], rank)
    return (Update(KERNEL, (factor,), site.params(orthogonal=site.field("apply_GS"))),)


def _memory(inputs: Infos) -> int:
    width = math.prod(inputs[0].shape[1:])
    return 3 * width * width


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and U `[in, r]`."""
    from converter.core.compute.updates import replaced

    def new(weight: Any, factors: Tensors, params: Given) -> Any:
        return (weight.reshape(weight.shape[0], -1) @ _reflections(factors[0], params)).reshape(weight.shape)

    return replaced(inputs, params, new)


def _reflections(u: Any, params: Given) -> Any:
    import torch

    one = torch.eye(len(u), dtype=u.dtype)
    if params["orthogonal"]:
        basis = [(u[:, 0] / u[:, 0].norm()).view(-1, 1)]
        for i in range(1, u.shape[1]):
            column = u[:, i].view(-1, 1)
            for before in basis:
                column = column - before.t() @ column * before
            basis.append((column / column.norm()).view(-1, 1))
        q = torch.cat(basis, dim=1)
        return one - 2 * q @ q.t()
    u = u / u.norm(dim=0)
    for i in range(u.shape[1]):
        column = u[:, i].view(-1, 1)
        one = one - 2 * one @ column @ column.t()
    return one


KERNEL = of_weight("hra-merge", "hra:merged", (None,), more=_memory)

METHOD = Method(
    title="HRA",
    peft_type="HRA",
    factors=("hra_u",),
    fields={**fields.of_training(only="hra_only"), "r": fields.count(8), "apply_GS": fields.flag()},
    update=update,
    layers="Linear, Conv2d",
    is_linear=False,
    kernels=(KERNEL,),
)
