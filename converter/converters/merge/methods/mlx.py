"""mlx-lm's LoRA: factors `[in, r]` and `[r, out]`, a scale of its own instead of alpha over rank.

Source: `LoRALinear.fuse`, https://github.com/ml-explore/mlx-lm/blob/v0.28.0/mlx_lm/tuner/lora.py
"""

from __future__ import annotations

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.core.tensors import kernel_specs
from converter.core.tensors.kernel_specs import Param

PEFT_TYPE = "MLX_LORA"
"""What the source calls it: mlx-lm's own config names no PEFT type."""


def update(site: Site) -> tuple[Update, ...]:
    """`W + scale * (a @ b)^T`.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`), or the shapes do not fit (`adapter-shape`).
    """
    a, b = site.take("lora_a"), site.take("lora_b")
    base, first, second = site.base["weight"].shape, a.info.shape, b.info.shape
    fits = len(first) == len(second) == 2 and first[1] == second[0] and (second[1], first[0]) == base
    if not fits:
        raise site.misfit(base, f"lora_a {list(first)}, lora_b {list(second)}")
    scale = site.field("mlx_scale") * site.weight
    params: dict[str, Param] = {
        "scales": (scale,),
        "dora": (False,),
        "numerics": site.numerics,
        "out": site.base["weight"].dtype.value,
        "transposed": True,
        "delta_rounded": False,
    }
    return (Update(kernel_specs.LORA_MERGE, (b, a), params, joins=True, scale=scale),)


METHOD = Method(
    title="LoRA of mlx-lm",
    peft_type=PEFT_TYPE,
    factors=("lora_a", "lora_b"),
    fields={"mlx_scale": fields.number(1), "r": fields.count(8), "lora_alpha": fields.number(8)},
    update=update,
    pairs=(("lora_a", "lora_b"),),
    zeros=("lora_b",),
)
