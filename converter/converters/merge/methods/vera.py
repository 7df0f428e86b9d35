"""VeRA: random projections that all layers share, scaled by trained vectors.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/vera/layer.py and model.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.converters.merge.orientation import is_conv1d
from converter.core.tensors.kernel_specs import Infos, Params
from converter.core.tensors.nodes import LazyTensor


def widest(site: Site) -> tuple[int, int]:
    """Outputs and inputs that the shared projections must cover: the largest of all adapted layers."""
    sizes = []
    for name, info in site.peers.items():
        turned = is_conv1d(f"{name}.weight", site.model_config)
        sizes.append(info.shape[::-1] if turned else info.shape)
    return max(s[0] for s in sizes), max(s[1] for s in sizes)


def update(site: Site) -> tuple[Update, ...]:
    """`W + (b * B) @ (d * A)`, with the rows of B and columns of A that the layer needs.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    factors, params = over_projections(site, "vera")
    return (Update(KERNEL, factors, params, scale=site.weight),)


def over_projections(site: Site, word: str, times: int = 1) -> tuple[tuple[LazyTensor, ...], Params]:
    """The kernel's inputs and parameters: b, d, and the projections where the file has them.

    Args:
        word: what the tensors' names begin with.
        times: how many times the rank d and A are high.

    Raises:
        Refused: see `update`.
    """
    outputs, _ = site.linear()
    rank, d = site.field("r"), site.take(f"{word}_lambda_d")
    site.expect_rank(rank, d.info.numel // times)
    factors = [site.shaped(f"{word}_lambda_b", outputs), site.fitting(f"{word}_lambda_d", d, times * rank)]
    high, wide = widest(site)
    if site.shared or site.field("save_projection"):
        factors += [
            site.fitting(f"{word}_A", site.common(f"{word}_A"), times * rank, wide),
            site.fitting(f"{word}_B", site.common(f"{word}_B"), high, rank),
        ]
    seed, base = site.field("projection_prng_key"), site.base["weight"].dtype.value
    return tuple(factors), site.params(seed=seed, rank=rank, high=high, wide=wide, base=base)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, b `[out]`, d `[r]`, and the projections A and B where they are not drawn."""
    return scaled_projections(inputs, params, _draw)


def scaled_projections(inputs: Tensors, params: Given, draw: Callable[[Any, Given], tuple[Any, Any]]) -> Any:
    """`W + (b * B) @ (d * A)`; of d and A as many rows as B has columns count."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        b, d, *projections = factors
        a, big = projections or draw(weight, params)
        high, wide = weight.shape[::-1] if params["transposed"] else weight.shape
        rank = big.shape[1]
        product = b.unsqueeze(-1) * big[:high] @ (d.unsqueeze(-1)[:rank] * a[:rank, :wide])
        return product.T if params["transposed"] else product

    return added(inputs, params, change)


def _draw(weight: Any, params: Given) -> tuple[Any, Any]:
    """The projections as PEFT draws them: from a seed, uniform as Kaiming has it, then rounded to the base's dtype."""
    import torch

    from converter.core.tensors.dtypes import DType

    generator = torch.Generator().manual_seed(int(params["seed"]))
    base = getattr(torch, DType(params["base"]).torch_name)

    def uniform(rows: int, columns: int) -> Any:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        drawn = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
        return drawn.to(base).to(weight.dtype)

    rank = int(params["rank"])
    return uniform(rank, int(params["wide"])), uniform(int(params["high"]), rank)


def memory(inputs: Infos) -> int:
    """Elements of both projections."""
    return 2 * inputs[2].numel * sum(inputs[0].shape)


KERNEL = of_weight("vera-merge", "vera:merged", more=memory)

OF_PROJECTIONS = {
    "r": fields.count(256),
    "projection_prng_key": fields.count(0, least=0),
    "save_projection": fields.flag(True),
}

METHOD = Method(
    title="VeRA",
    peft_type="VERA",
    factors=("vera_lambda_b", "vera_lambda_d"),
    fields={
        **fields.of_training("vera_dropout", "d_initial", only="vera_only"),
        **OF_PROJECTIONS,
    },
    update=update,
    layers="Linear, Conv1D",
    remark="projections from the file, or drawn again from their seed",
    shared=("vera_A", "vera_B"),
    pairs=(("vera_lambda_b", "vera_lambda_d"),),
    zeros=("vera_lambda_b",),
    kernels=(KERNEL,),
)
