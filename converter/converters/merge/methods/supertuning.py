"""Super-tuning: the weight's largest (or smallest) elements are trained, with a LoRA beside them if asked.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/supertuning/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.shira import scattered
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_LORA = ("supertuning_lora_A", "supertuning_lora_B")


def update(site: Site) -> tuple[Update, ...]:
    """Values are added at places of the flat weight; `B @ A * alpha / r` too.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    outputs, inputs = site.linear()
    count = int(outputs * inputs * (1 - site.field("sparsity")))
    names = ["supertuning_values"]
    factors = [site.shaped("supertuning_values", count)]
    has_places = site.field("save_precomputed_indices")
    if has_places:
        names.append("supertuning_indices")
        factors.append(site.shaped("supertuning_indices", count))
    rank = site.field("r")
    if rank:
        names += _LORA
        factors += [site.shaped(_LORA[0], rank, inputs), site.shaped(_LORA[1], outputs, rank)]
    site.nothing_beside(*names)
    if site.is_turned:
        raise site.misfit(site.base["weight"].shape, "factors of Super-tuning, which has none for such layers")
    params = site.params(
        scale=site.field("lora_alpha") / rank if rank else 0.0,
        placed=has_places,
        largest=site.field("select_top"),
        base=site.base["weight"].dtype.value,
    )
    return (Update(KERNEL, tuple(factors), params),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, the values `[n]`, their places `[n]` unless they are found anew, and of a LoRA A and B."""
    import torch

    from converter.core.compute.updates import replaced
    from converter.core.tensors.dtypes import DType

    def new(weight: Any, factors: Tensors, params: Given) -> Any:
        values, *rest = factors
        if params["placed"]:
            places, *rest = rest
        else:
            scores = weight.to(getattr(torch, DType(params["base"]).torch_name)).abs().flatten()
            places = torch.topk(scores, k=len(values), largest=bool(params["largest"]))[1]
        change = scattered(values.to(weight.dtype), places.long().unsqueeze(0), (weight.numel(),))
        made = weight + change.view(weight.shape)
        return made + (params["scale"] * (rest[1] @ rest[0])).to(weight.dtype) if rest else made

    return replaced(inputs, params, new, own_dtype=True)


KERNEL = of_weight("supertuning-merge", "supertuning:merged", copies=6)

METHOD = Method(
    title="Super-tuning",
    peft_type="SUPERTUNING",
    factors=("supertuning_values", "supertuning_indices", *_LORA),
    fields={
        **fields.of_training("lora_dropout"),
        "sparsity": fields.number(0.99),
        "select_top": fields.flag(True),
        "r": fields.count(0, least=0),
        "lora_alpha": fields.number(0),
        "save_precomputed_indices": fields.flag(True),
    },
    update=update,
    pairs=(_LORA,),
    zeros=("supertuning_values", "supertuning_lora_B"),
    is_linear=False,
    kernels=(KERNEL,),
)
