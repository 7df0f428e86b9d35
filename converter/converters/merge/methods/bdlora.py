"""BD-LoRA: LoRA one of whose matrices is block-diagonal, and stored without its zeros.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/variants.py (`BdLoraLinearVariant`)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from converter.converters.merge.methods import fields, lora
from converter.converters.merge.methods.method import Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_KEYS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}


def _blocks(value: Any, key: str, where: str) -> dict[str, Any]:
    """Names whose A, and whose B, is in blocks, and how many blocks."""
    if not value:
        return {}
    if not isinstance(value, dict) or not value.keys() <= _KEYS:
        raise fields.malformed(key, value, where, f"an object of {', '.join(sorted(_KEYS))}")
    return {
        "a": fields.names().read(value.get("target_modules_bd_a"), key, where),
        "b": fields.names().read(value.get("target_modules_bd_b"), key, where),
        "nblocks": fields.count(1).read(value.get("nblocks"), key, where),
    }


def update(site: Site) -> tuple[Update, ...]:
    """`W + B @ A * scale`.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    site.nothing_beside("lora_A", "lora_B")
    said, name = site.field("use_bdlora"), site.module.name.rpartition(".")[2]
    is_a, is_b = (any(word in name for word in said[side]) for side in ("a", "b"))
    if is_a and is_b:
        raise site.incomplete("both of its matrices are said to be in blocks")
    rank, count = lora.rank_of(site), said["nblocks"]
    cut_a, cut_b = count if is_a else 1, count if is_b else 1
    a = site.take("lora_A")
    site.expect_rank(rank, a.info.shape[0] if a.info.shape else 0)
    if rank % count or inputs % cut_a or outputs % cut_b:
        raise site.misfit(site.base["weight"].shape, f"{count} blocks")
    factors = (site.fitting("lora_A", a, rank, inputs // cut_a), site.shaped("lora_B", outputs, rank // cut_b))
    scale = lora.scale_of(site)
    params = site.params(scale=scale, blocks=(cut_a, cut_b))
    return (Update(KERNEL, factors, params, scale=scale * site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A and B, one of them without the zeros beside its blocks."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        block_diag: Any = torch.block_diag
        a, b = (block_diag(*torch.chunk(f, n, dim=0)) for f, n in zip(factors, params["blocks"], strict=True))
        product = b @ a
        return (product.T if params["transposed"] else product) * params["scale"]

    return added(inputs, params, change, "update-first")


KERNEL = of_weight("bdlora-merge", "bdlora:merged")

METHOD = dataclasses.replace(
    lora.METHOD,
    title="BD-LoRA",
    switch="use_bdlora",
    fields={**lora.FIELDS, "use_bdlora": fields.Field(_blocks)},
    update=update,
    kernels=(KERNEL,),
)
