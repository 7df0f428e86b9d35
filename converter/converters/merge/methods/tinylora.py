"""TinyLoRA: one short vector, spread by fixed random tensors, moves the weight's first singular directions.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tinylora/layer.py and model.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.errors import Refused
from converter.text import show

_VECTOR = "tinylora_v.0"


def _tied(value: Any, key: str, where: str) -> float:
    """1: all layers have one vector. Below it which vector is whose depends on the order of the model's layers."""
    if value != 1:
        what = f"`{key}` is {show(value)}: layers have different vectors, and no file says which is whose"
        raise Refused("adapter-field-unsupported", what, where=where, facts={"field": key})
    return 1.0


def _saved(value: Any, key: str, where: str) -> bool:
    if value is False:
        what = f"`{key}` is false: how projections are drawn depends on the order of the model's layers"
        raise Refused("adapter-field-unsupported", what, where=where, facts={"field": key})
    return True


def update(site: Site) -> tuple[Update, ...]:
    """`W + B @ (sum_i v_i P_i) @ A`, all of them from the file.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    outputs, inputs = site.linear()
    a = site.take("tinylora_A")
    rank, length = a.info.shape[0] if a.info.shape else 0, site.field("u")
    is_row_wise = "embed" in site.module.name.rpartition(".")[2]
    if is_row_wise:
        outputs, inputs = site.base["weight"].shape
    factors = (
        site.fitting("tinylora_A", a, rank, inputs),
        site.shaped("tinylora_B", outputs, rank),
        site.shaped("tinylora_P", length, rank, rank),
        site.fitting(_VECTOR, site.common(_VECTOR), length),
    )
    params = site.params(transposed=site.is_turned and not is_row_wise)
    return (Update(KERNEL, factors, params, scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A `[r, in]`, B `[out, r]`, P `[u, r, r]` and the vector `[u]`."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b, p, v = factors
        product = b @ torch.einsum("i,ijk->jk", v, p) @ a
        return product.T if params["transposed"] else product

    return added(inputs, params, change)


KERNEL = of_weight("tinylora-merge", "tinylora:merged")

METHOD = Method(
    title="TinyLoRA",
    peft_type="TINYLORA",
    factors=("tinylora_A", "tinylora_B", "tinylora_P"),
    fields={
        **fields.of_training("tinylora_dropout", "projection_seed", "init_v_bound", "r", only="tinylora_only"),
        "u": fields.count(64),
        "weight_tying": fields.Field(_tied),
        "save_projection": fields.Field(_saved),
    },
    update=update,
    shared=(_VECTOR,),
    pairs=(("tinylora_A", "tinylora_B"),),
    kernels=(KERNEL,),
)
