"""LoKr: a Kronecker product is added, each side of it whole or of low rank.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lokr/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.loha import FIELDS, expect_cores
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_PAIRS = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))


def update(site: Site) -> tuple[Update, ...]:
    """`W + kron(w1, w2) * alpha / r`; which sides are whole is what the file has.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`), or PEFT scaled it otherwise when it was trained (`adapter-ambiguous`).
    """
    shape, held = site.base["weight"].shape, site.module.factors
    if site.is_turned or len(shape) > 4:
        raise site.misfit(shape, "factors of LoKr, which has none for such layers")
    rank = site.matched("rank_pattern", "r")
    first = ("lokr_w1",) if "lokr_w1" in held else _PAIRS[0]
    second = ("lokr_w2",) if "lokr_w2" in held else _PAIRS[1]
    core = ("lokr_t2",) if "lokr_t2" in held else ()
    expect_cores(site, bool(core), shape)
    site.nothing_beside(*first, *second, *core)
    outer = [site.take(name) for name in first]
    inner = [site.take(name) for name in (*core, *second)]
    for pair, found in ((first, outer), (second, inner[len(core) :])):
        if len(pair) == 2:
            site.expect_rank(rank, next(iter(found[1].info.shape), 0))
    left, right = _size(site, [x.info.shape for x in outer], ()), _size(site, [x.info.shape for x in inner], core)
    sizes = (left[0] * right[0], left[1] * right[1])
    whole = len(right) > 2 and sizes == shape[:2] and right[2:] == shape[2:]
    if not whole and sizes != site.sides:
        raise site.misfit(shape, f"a Kronecker product of {list(left)} and {list(right)}")
    scale = site.matched("alpha_pattern", "alpha") / rank
    if site.config.is_older:  # it did not scale the product
        advice = f'set "alpha" in adapter_config.json to {rank} for what was trained, or "peft_version" to "0.14.0"'
        site.expect_one_rule("the scale", 1.0, scale, advice)
    params = site.params(scale=scale, outer=len(outer), core=bool(core))
    return (Update(KERNEL, (*outer, *inner), params, scale=scale * site.weight),)


def _size(site: Site, shapes: list[tuple[int, ...]], core: tuple[str, ...]) -> tuple[int, ...]:
    """The shape of one side of the product."""
    kernel = (*site.base["weight"].shape[2:], 1)[:2]
    if core:
        middle, a, b = shapes
        if len(a) == len(b) == 2 and middle == (a[0], b[0], *kernel) and a[0] == b[0]:
            return (a[1], b[1], *site.base["weight"].shape[2:])
    elif len(shapes) == 2:
        a, b = shapes
        if len(a) == len(b) == 2 and a[1] == b[0]:
            return (a[0], b[1])
    elif len(shapes[0]) >= 2:
        return shapes[0]
    raise site.misfit(site.base["weight"].shape, f"factors {[list(s) for s in shapes]}")


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, the left side (one factor or two), then the right side, after its core if it has one."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        count = int(params["outer"])
        outer, inner = factors[:count], factors[count:]
        left = outer[0] if count == 1 else outer[0] @ outer[1]
        if params["core"]:
            core, a, b = inner
            right = torch.einsum("ijkl,ip,jr->prkl", core, a, b)
        else:
            right = inner[0] if len(inner) == 1 else inner[0] @ inner[1]
        if right.dim() == 4:
            left = left.unsqueeze(2).unsqueeze(2)
        return (torch.kron(left, right.contiguous()) * params["scale"]).reshape(weight.shape)

    return added(inputs, params, change)


KERNEL = of_weight("lokr-merge", "lokr:merged", copies=5)

METHOD = Method(
    title="LoKr",
    peft_type="LOKR",
    factors=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    fields={
        **FIELDS,
        "decompose_both": fields.ignored(),
        "decompose_factor": fields.ignored(),
        "rank_dropout_scale": fields.ignored(),
    },
    update=update,
    layers="Linear, Conv1d, Conv2d",
    pairs=_PAIRS,
    zeros=("lokr_w1", "lokr_w1_a"),
    kernels=(KERNEL,),
)
