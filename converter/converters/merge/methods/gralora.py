"""GraLoRA: LoRA in blocks that exchange parts of their ranks.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/gralora/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos

_GENERAL = ("gralora_A_general", "gralora_B_general")


def update(site: Site) -> tuple[Update, ...]:
    """`W + G * alpha / (r + hybrid_r)`, G of k x k blocks, and a plain LoRA beside them where `hybrid_r` is set.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    rank, hybrid, k = site.field("r"), site.field("hybrid_r"), site.field("gralora_k")
    a = site.take("gralora_A")
    site.expect_rank(rank, a.info.shape[-1] if a.info.shape else 0)
    if outputs % k or inputs % k or rank % k:
        raise site.misfit(site.base["weight"].shape, f"{k} blocks of rank {rank}")
    factors = [site.fitting("gralora_A", a, k, inputs // k, rank), site.shaped("gralora_B", k, rank, outputs // k)]
    if hybrid:
        factors += [site.shaped(_GENERAL[0], hybrid, inputs), site.shaped(_GENERAL[1], outputs, hybrid)]
    site.nothing_beside("gralora_A", "gralora_B", *(_GENERAL if hybrid else ()))
    scale = site.field("alpha") / (rank + hybrid)
    return (Update(KERNEL, tuple(factors), site.params(scale=scale), scale=scale * site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A `[k, in / k, r]`, B `[k, r, out / k]`, and of a hybrid A `[h, in]` and B `[out, h]`."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b, *general = factors
        k, width, rank = a.shape
        inputs, outputs = k * width, b.shape[0] * b.shape[2]
        # Each stretch of inputs has its own A; its ranks are dealt out over the blocks of outputs.
        spread = torch.zeros(k, width, k, rank, dtype=a.dtype)
        spread[torch.arange(k), :, torch.arange(k)] = a
        dealt = spread.view(inputs, k, k, rank // k).permute(0, 2, 1, 3).reshape(inputs, k, rank)
        product = torch.einsum("ikr, kro -> iko", dealt, b).reshape(inputs, outputs).T
        if general:
            product = product + general[1] @ general[0]
        return (product.T if params["transposed"] else product) * params["scale"]

    return added(inputs, params, change)


def _memory(inputs: Infos) -> int:
    return 3 * inputs[1].numel * inputs[1].shape[0]


KERNEL = of_weight("gralora-merge", "gralora:merged", more=_memory)

METHOD = Method(
    title="GraLoRA",
    peft_type="GRALORA",
    factors=("gralora_A", "gralora_B", *_GENERAL),
    fields={
        **fields.of_training("gralora_dropout", only="gralora_only"),
        "r": fields.count(32),
        "hybrid_r": fields.count(0, least=0),
        "alpha": fields.number(64),
        "gralora_k": fields.count(2),
    },
    update=update,
    pairs=(("gralora_A", "gralora_B"), _GENERAL),
    zeros=("gralora_B", "gralora_B_general"),
    kernels=(KERNEL,),
)
