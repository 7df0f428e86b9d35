"""AdaLoRA: LoRA with singular values of its own, of which training cuts some away.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/adalora/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.lora import FIELDS as LORA_FIELDS
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_EPSILON = 1e-5


def _ranks(value: Any, key: str, where: str) -> dict[str, int]:
    """Ranks by module: the file has a list of true and false for each, and only what is true was saved."""
    if not value:
        return {}
    masks = value.items() if isinstance(value, dict) else [("", value)]
    sound = all(isinstance(m, list) and all(isinstance(b, bool) for b in m) for _, m in masks)
    if not isinstance(value, dict) or not sound:
        raise fields.malformed(key, value, where, "an object with a list of true and false for each module")
    return {name.removesuffix(".lora_E"): sum(mask) for name, mask in masks}


def update(site: Site) -> tuple[Update, ...]:
    """`W + B @ (A * E) * alpha / (init_r + 1e-5)`.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    site.nothing_beside("lora_A", "lora_B", "lora_E")
    outputs, inputs = site.sides
    first, ranks = site.field("init_r"), site.field("rank_pattern")
    e = site.take("lora_E")
    rank = e.info.shape[0] if e.info.shape else 0
    site.expect_rank(ranks.get(site.module.name, first), rank)
    factors = (
        site.shaped("lora_A", rank, inputs),
        site.shaped("lora_B", outputs, rank),
        site.fitting("lora_E", e, rank, 1),
    )
    alpha = site.field("lora_alpha")
    params = site.params(alpha=alpha if alpha > 0 else float(first), first=first)
    return (Update(KERNEL, factors, params, scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A `[r, in]`, B `[out, r]`, E `[r, 1]`."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b, e = factors
        first = torch.tensor([float(params["first"])], dtype=weight.dtype)
        product = b @ (a * e)
        product = product.T if params["transposed"] else product
        return (product * params["alpha"] / (first + _EPSILON)).reshape(weight.shape)

    return added(inputs, params, change)


KERNEL = of_weight("adalora-merge", "adalora:merged", (None, 0, None))

METHOD = Method(
    title="AdaLoRA",
    peft_type="ADALORA",
    factors=("lora_A", "lora_B", "lora_E"),
    fields={
        **{name: field for name, field in LORA_FIELDS.items() if field.refused},
        **dict.fromkeys(LORA_FIELDS.keys() - {n for n, f in LORA_FIELDS.items() if f.refused}, fields.ignored()),
        **dict.fromkeys(
            ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "use_dora"),
            fields.ignored(),
        ),
        "use_dora": fields.refused("AdaLoRA with DoRA does not exist in PEFT"),
        "lora_bias": fields.refused("AdaLoRA has no biases"),
        "init_r": fields.count(12),
        "lora_alpha": fields.number(8),
        "rank_pattern": fields.Field(_ranks),
    },
    update=update,
    pairs=(("lora_A", "lora_B"),),
    zeros=("lora_E",),
    kernels=(KERNEL,),
)
