"""RandLoRA: a sum over random bases that all layers share, weighted by trained factors.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/randlora/layer.py and model.py
"""

from __future__ import annotations

import math
from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.converters.merge.methods.vera import widest
from converter.core.tensors.kernel_specs import Infos
from converter.core.tensors.nodes import LazyTensor


def update(site: Site) -> tuple[Update, ...]:
    """`W + sum_n B_n diag(lambda_n) A diag(gamma_n) * alpha / r`; A and B are shared by all layers, and change places
    where a layer has more outputs than inputs.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    low = min(site.linear())
    rank, weights = site.field("r"), site.take("randlora_lambda")
    site.expect_rank(rank, weights.info.shape[0] if weights.info.shape else 0)
    bases = -(-low // rank)
    factors = [site.fitting("randlora_lambda", weights, rank, bases), site.shaped("randlora_gamma", bases, low)]
    short, long = sorted(widest(site))
    most = -(-short // rank)
    if site.field("save_projection"):
        factors += [
            site.fitting("randlora_A", _projection(site, "randlora_A"), rank, 1, short),
            site.fitting("randlora_B", _projection(site, "randlora_B"), long, most, rank),
        ]
    kind = "very" if site.field("very_sparse") else "sparse" if site.field("sparse") else "dense"
    scale = site.field("randlora_alpha") / rank
    params = site.params(
        scale=scale,
        seed=site.field("projection_prng_key"),
        draw=kind,
        sizes=(rank, most, short, long),
        base=site.base["weight"].dtype.value,
    )
    return (Update(KERNEL, tuple(factors), params, scale=scale * site.weight),)


def _projection(site: Site, name: str) -> LazyTensor:
    """A shared projection: PEFT saves it with each layer, and in some versions once for the model."""
    return site.module.factors[name] if name in site.module.factors else site.common(name)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, lambda `[r, n]`, gamma `[n, min]`, and A `[r, 1, min]` and B `[max, n, r]` unless drawn."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        lam, gamma, *projections = factors
        outputs, inputs = weight.shape[::-1] if params["transposed"] else weight.shape
        low, high = min(outputs, inputs), max(outputs, inputs)
        a, b = projections or _draw(weight.dtype, params)
        count = lam.shape[1]
        mixed = (lam[:, :, None] * a[:, :count, :low] * gamma[None]).flatten(end_dim=1)
        big = b[:high, :count].flatten(start_dim=1)
        left, right = (mixed, big) if low == inputs else (big.T, mixed.T)
        product = (left.T @ right.T).T
        return (product.T if params["transposed"] else product) * params["scale"]

    return added(inputs, params, change, "update-first")


def _draw(dtype: Any, params: Given) -> tuple[Any, Any]:
    """A and B as PEFT draws them from the seed, rounded to the base's dtype as its layers are."""
    import torch

    from converter.core.tensors.dtypes import DType

    generator = torch.Generator().manual_seed(int(params["seed"]))
    sizes = params["sizes"]
    assert isinstance(sizes, tuple)
    rank, count, short, long = (int(n) for n in sizes)
    if params["draw"] == "dense":
        shapes = ((rank, 1, short), *[(long, 1, rank)] * count)
        drawn = [
            torch.nn.init.kaiming_uniform_(torch.empty(s, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)
            for s in shapes
        ]
        a, b = drawn[0], torch.cat(drawn[1:], dim=1)
    else:
        rate = 2 * (math.sqrt(short) if params["draw"] == "very" else 3)
        chance = [torch.rand(s, generator=generator) for s in ((rank, 1, short), (long, count, rank))]
        a, b = ((c > 1 - 1 / rate).float() - (c < 1 / rate).float() for c in chance)
    base = getattr(torch, DType(params["base"]).torch_name)
    return (a / a.std()).to(base).to(dtype), (b / b.std()).to(base).to(dtype)


def _memory(inputs: Infos) -> int:
    return 3 * sum(inputs[0].shape) * inputs[1].numel


KERNEL = of_weight("randlora-merge", "randlora:merged", more=_memory)

METHOD = Method(
    title="RandLoRA",
    peft_type="RANDLORA",
    factors=("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    fields={
        **fields.of_training("randlora_dropout", only="randlora_only"),
        "r": fields.count(32),
        "randlora_alpha": fields.number(640),
        "projection_prng_key": fields.count(0, least=0),
        "save_projection": fields.flag(True),
        "sparse": fields.flag(),
        "very_sparse": fields.flag(),
    },
    update=update,
    shared=("randlora_A", "randlora_B"),
    pairs=(("randlora_lambda", "randlora_gamma"),),
    zeros=("randlora_lambda",),
    kernels=(KERNEL,),
)
