"""PVeRA: VeRA whose scaling is a distribution; merged is its mean.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/pvera/layer.py and model.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.converters.merge.methods.vera import OF_PROJECTIONS, memory, over_projections, scaled_projections


def update(site: Site) -> tuple[Update, ...]:
    """`W + (b * B) @ (d * A)`, with the first half of d and of A's rows; the second half is the spread.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    factors, params = over_projections(site, "pvera", times=2)
    return (Update(KERNEL, factors, params, scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, b `[out]`, d `[2 r]`, and the projections A and B where they are not drawn."""
    return scaled_projections(inputs, params, _draw)


def _draw(weight: Any, params: Given) -> tuple[Any, Any]:
    """The projections as PEFT draws them from a seed, rounded to the base's dtype."""
    import torch

    from converter.core.tensors.dtypes import DType

    generator = torch.Generator().manual_seed(int(params["seed"]))
    rank, base = int(params["rank"]), getattr(torch, DType(params["base"]).torch_name)
    sizes = ((2 * rank, int(params["wide"])), (int(params["high"]), rank))
    a, b = (torch.nn.init.kaiming_uniform_(torch.empty(size), generator=generator) for size in sizes)
    return a.to(base).to(weight.dtype), b.to(base).to(weight.dtype)


KERNEL = of_weight("pvera-merge", "pvera:merged", more=memory)

METHOD = Method(
    title="PVeRA",
    peft_type="PVERA",
    factors=("pvera_lambda_b", "pvera_lambda_d"),
    fields={
        **fields.of_training("pvera_dropout", "d_initial", "generator_seed", only="pvera_only"),
        **OF_PROJECTIONS,
        "sample_at_inference": fields.refused("the adapter draws at random in each forward"),
    },
    update=update,
    layers="Linear, Conv1D",
    remark="the mean; `sample_at_inference` is refused",
    shared=("pvera_A", "pvera_B"),
    pairs=(("pvera_lambda_b", "pvera_lambda_d"),),
    zeros=("pvera_lambda_b",),
    kernels=(KERNEL,),
)
