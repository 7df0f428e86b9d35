"""LoHa: the elementwise product of two low-rank matrices is added.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/loha/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos, Params

_FLAT = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


def update(site: Site) -> tuple[Update, ...]:
    """`W + (w1a @ w1b) * (w2a @ w2b) * alpha / r`; with cores for the kernels of a convolution.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    shape = site.base["weight"].shape
    outputs, inputs = site.sides
    rank = site.matched("rank_pattern", "r")
    got = site.take("hada_w1_b").info.shape
    site.expect_rank(rank, got[0] if got else 0)
    has_cores = not site.module.factors.keys().isdisjoint(_CORES)
    if site.is_turned or len(shape) > 4:
        raise site.misfit(shape, "factors of LoHa, which has none for such layers")
    expect_cores(site, has_cores, shape)
    if has_cores:
        kernel = (*shape[2:], 1)[:2]
        names: tuple[str, ...] = (*_FLAT, *_CORES)
        wanted = [(rank, shape[0]), (rank, shape[1])] * 2 + [(rank, rank, *kernel)] * 2
    else:
        names = _FLAT
        wanted = [(outputs, rank), (rank, inputs)] * 2
    site.nothing_beside(*names)
    factors = tuple(site.shaped(name, *size) for name, size in zip(names, wanted, strict=True))
    scale = site.matched("alpha_pattern", "alpha") / rank
    return (Update(KERNEL, factors, site.params(scale=scale), scale=scale * site.weight),)


def expect_cores(site: Site, has_cores: bool, shape: tuple[int, ...]) -> None:
    """Cores stand where `use_effective_conv2d` is set, over kernels of more than one place, and nowhere else.

    Raises:
        Refused: they do not (`adapter-incomplete`).
    """
    is_wide = len(shape) > 2 and any(n != 1 for n in shape[2:])
    if has_cores and not (site.field("use_effective_conv2d") and is_wide):
        raise site.incomplete("the layer has a core for a kernel, and use_effective_conv2d is not set for it")


def _rows(inputs: Infos, params: Params) -> tuple[int | None, ...]:
    return (0, None, 0, None) if len(inputs) == 5 else (1, None, 1, None, None, None)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, the four factors, and for a convolution's kernel two cores."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        w1a, w1b, w2a, w2b, *cores = factors
        if cores:
            first, second = (
                torch.einsum("ijkl,jr,ip->prkl", core, b, a)
                for core, a, b in zip(cores, (w1a, w2a), (w1b, w2b), strict=True)
            )
        else:
            first, second = w1a @ w1b, w2a @ w2b
        product = (first * second) * params["scale"]
        return product.reshape(weight.shape)

    return added(inputs, params, change)


KERNEL = of_weight("loha-merge", "loha:merged", _rows)

FIELDS = {
    **fields.of_training("rank_dropout", "module_dropout"),
    "r": fields.count(8),
    "alpha": fields.number(8),
    "rank_pattern": fields.pattern(int),
    "alpha_pattern": fields.pattern(float),
    "use_effective_conv2d": fields.flag(),
}

METHOD = Method(
    title="LoHa",
    peft_type="LOHA",
    factors=(*_FLAT, *_CORES),
    fields=FIELDS,
    update=update,
    pairs=(("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), _CORES),
    zeros=("hada_w2_b",),
    kernels=(KERNEL,),
)
