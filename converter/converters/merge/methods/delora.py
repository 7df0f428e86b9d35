"""DeLoRA: LoRA with normalised directions and one trained length.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/delora/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_SMALLEST = 1e-4


def update(site: Site) -> tuple[Update, ...]:
    """`W + B diag(lambda / r / (|a| |b|)) A * w_norm`.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    rank, a = site.matched("rank_pattern", "r"), site.take("delora_A")
    site.expect_rank(rank, a.info.shape[0] if a.info.shape else 0)
    if site.is_turned:
        raise site.misfit(site.base["weight"].shape, "factors of DeLoRA, which has none for such layers")
    factors = (
        site.fitting("delora_A", a, rank, inputs),
        site.shaped("delora_B", outputs, rank),
        site.shaped("delora_lambda", 1),
        site.shaped("delora_w_norm", inputs),
    )
    return (Update(KERNEL, factors, site.params(rank=rank), scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A `[r, in]`, B `[out, r]`, the length `[1]` and the norms of the base's columns `[in]`."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b, length, norms = factors
        first, second = torch.clamp(a.norm(dim=1), min=_SMALLEST), torch.clamp(b.norm(dim=0), min=_SMALLEST)
        middle = torch.diag_embed(length / int(params["rank"]) / (first * second))
        return b @ middle @ a * norms.unsqueeze(0)

    return added(inputs, params, change, "update-first")


KERNEL = of_weight("delora-merge", "delora:merged")

METHOD = Method(
    title="DeLoRA",
    peft_type="DELORA",
    factors=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    fields={
        **fields.of_training("module_dropout", "delora_lambda", "lambda_pattern", only="delora_only"),
        "r": fields.count(8),
        "rank_pattern": fields.pattern(int),
    },
    update=update,
    pairs=(("delora_A", "delora_B"),),
    zeros=("delora_B",),
    kernels=(KERNEL,),
)
