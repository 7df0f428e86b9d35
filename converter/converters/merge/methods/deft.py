"""DEFT: what the weight has in a trained subspace is taken out and replaced.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/deft/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight


def update(site: Site) -> tuple[Update, ...]:
    """`W + Q @ (R * alpha / r - right(P)^T @ W)`, Q being P or its orthogonal factor; without R where `para` is set.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    p, rank = site.take("deft_P"), min(site.field("r"), outputs)
    site.expect_rank(rank, p.info.shape[-1] if p.info.shape else 0)
    factors = [site.fitting("deft_P", p, outputs, rank)]
    if not site.field("para"):
        factors.append(site.shaped("deft_R", rank, inputs))
    site.nothing_beside("deft_P", *(() if site.field("para") else ("deft_R",)))
    alpha = site.field("alpha")
    params = site.params(scale=alpha / rank if alpha else 1.0, way=site.field("decomposition_method"))
    return (Update(KERNEL, tuple(factors), params),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, P `[out, r]` and R `[r, in]` if there is one."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        p, *r = factors
        flat = weight.T if params["transposed"] else weight
        q, right = (p, torch.relu(p)) if params["way"] == "relu" else (torch.linalg.qr(p)[0],) * 2
        held = right.transpose(0, 1) @ flat
        product = q @ (r[0] * params["scale"] - held) if r else -(q @ held)
        return product.T if params["transposed"] else product

    return added(inputs, params, change, "update-first")


KERNEL = of_weight("deft-merge", "deft:merged")

METHOD = Method(
    title="DEFT",
    peft_type="DEFT",
    factors=("deft_P", "deft_R"),
    fields={
        **fields.of_training("deft_dropout", "init_scale", only="deft_only"),
        "r": fields.count(8),
        "alpha": fields.number(0),
        "para": fields.flag(),
        "decomposition_method": fields.choice("relu", "qr"),
    },
    update=update,
    is_linear=False,
    kernels=(KERNEL,),
)
