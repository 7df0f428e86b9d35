"""KaSA: LoRA with trained singular values, over a base that lost its last singular directions.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/variants.py (`KasaLinearVariant`)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from converter.converters.merge.methods import fields, lora
from converter.converters.merge.methods.method import Site, Start, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos

DIAGONAL = "lora_diag"


def update(site: Site) -> tuple[Update, ...]:
    """`W' + (B * d) @ A * scale`, W' being W without its last r singular directions.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    site.nothing_beside("lora_A", "lora_B", DIAGONAL)
    rank, a = lora.rank_of(site), site.take("lora_A")
    site.expect_rank(rank, a.info.shape[0] if a.info.shape else 0)
    if site.is_turned or rank >= min(outputs, inputs):
        raise site.misfit(site.base["weight"].shape, f"a LoRA of rank {rank} that KaSA can't have here")
    factors = (
        site.fitting("lora_A", a, rank, inputs),
        site.shaped("lora_B", outputs, rank),
        site.shaped(DIAGONAL, rank),
    )
    scale = lora.scale_of(site)
    start = Start(BASE, {"kept": min(outputs, inputs) - rank, "out": site.base["weight"].dtype.value, "numerics": ""})
    moved = start if site.field("kasa_config") else None
    return (Update(KERNEL, factors, site.params(scale=scale), start=moved, scale=scale * site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A `[r, in]`, B `[out, r]` and d `[r]`."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b, d = factors
        return (b * d) @ a * params["scale"]

    return added(inputs, params, change, "update-first")


def truncated(inputs: Tensors, params: Given) -> Any:
    """The kernel: W with so many of its singular directions, as PEFT leaves it when the adapter is loaded."""
    import torch

    (weight,) = inputs
    kept = int(params["kept"])
    u, s, vh = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
    return ((u[:, :kept] * s[:kept]) @ vh[:kept]).to(weight.dtype)


def _memory(inputs: Infos) -> int:
    rows, columns = inputs[0].shape
    small = min(rows, columns)
    return 2 * small * (rows + columns) + 8 * small * small


KERNEL = of_weight("kasa-merge", "kasa:merged", (None, 0, None))
BASE = dataclasses.replace(of_weight("kasa-base", "kasa:truncated", more=_memory), rounds=False)

METHOD = dataclasses.replace(
    lora.METHOD,
    title="KaSA",
    switch="kasa_config",
    factors=(*lora.METHOD.factors, DIAGONAL),
    fields={**lora.FIELDS, "kasa_config": fields.Field(lambda v, key, where: v is not None, moves_base=True)},
    update=update,
    is_linear=False,
    kernels=(KERNEL, BASE),
)
