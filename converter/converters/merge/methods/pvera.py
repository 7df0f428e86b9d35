"""PVeRA: VeRA whose scaling is a distribution; merged is its mean.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/pvera/layer.py and model.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.converters.merge.methods.vera import widest
from converter.core.tensors.kernel_specs import Infos


def update(site: Site) -> tuple[Update, ...]:
    """`W + (b * B) @ (d * A)`, with the first half of d and of A's rows; the second half is the spread.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    outputs, _ = site.linear()
    rank, d = site.field("r"), site.take("pvera_lambda_d")
    site.expect_rank(rank, d.info.numel // 2)
    factors = [site.shaped("pvera_lambda_b", outputs), site.fitting("pvera_lambda_d", d, 2 * rank)]
    high, wide = widest(site)
    if site.shared or site.field("save_projection"):
        factors += [
            site.fitting("pvera_A", site.common("pvera_A"), 2 * rank, wide),
            site.fitting("pvera_B", site.common("pvera_B"), high, rank),
        ]
    seed, base = site.field("projection_prng_key"), site.base["weight"].dtype.value
    params = site.params(seed=seed, rank=rank, high=high, wide=wide, base=base)
    return (Update(KERNEL, tuple(factors), params, scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, b `[out]`, d `[2 r]`, and the projections A and B where they are not drawn."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        b, d, *projections = factors
        a, big = projections or _draw(weight, params)
        high, wide = weight.shape[::-1] if params["transposed"] else weight.shape
        rank = len(d) // 2
        product = b.unsqueeze(-1) * big[:high] @ (d.unsqueeze(-1)[:rank] * a[:rank, :wide])
        return product.T if params["transposed"] else product

    return added(inputs, params, change)


def _draw(weight: Any, params: Given) -> tuple[Any, Any]:
    """The projections as PEFT draws them from a seed, rounded to the base's dtype."""
    import torch

    from converter.core.tensors.dtypes import DType

    generator = torch.Generator().manual_seed(int(params["seed"]))
    rank, base = int(params["rank"]), getattr(torch, DType(params["base"]).torch_name)
    sizes = ((2 * rank, int(params["wide"])), (int(params["high"]), rank))
    a, b = (torch.nn.init.kaiming_uniform_(torch.empty(size), generator=generator) for size in sizes)
    return a.to(base).to(weight.dtype), b.to(base).to(weight.dtype)


def _memory(inputs: Infos) -> int:
    return 2 * inputs[2].numel * sum(inputs[0].shape)


KERNEL = of_weight("pvera-merge", "pvera:merged", more=_memory)

METHOD = Method(
    title="PVeRA",
    peft_type="PVERA",
    factors=("pvera_lambda_b", "pvera_lambda_d"),
    fields={
        **fields.of_training("pvera_dropout", "d_initial", "generator_seed", only="pvera_only"),
        "r": fields.count(256),
        "projection_prng_key": fields.count(0, least=0),
        "save_projection": fields.flag(True),
        "sample_at_inference": fields.refused("the adapter draws at random in each forward"),
    },
    update=update,
    shared=("pvera_A", "pvera_B"),
    pairs=(("pvera_lambda_b", "pvera_lambda_d"),),
    zeros=("pvera_lambda_b",),
    kernels=(KERNEL,),
)
