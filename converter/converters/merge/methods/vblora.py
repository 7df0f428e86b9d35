"""VB-LoRA: both LoRA matrices are put together from vectors of one bank, chosen by trained logits.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/vblora/layer.py and model.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos

_SIDES = ("vblora_logits_A", "vblora_logits_B")
_CHOICE = ("topk_indices", "topk_weights")


def update(site: Site) -> tuple[Update, ...]:
    """`W + B @ A`, each piece of A and B a mixture of the bank's vectors with the largest logits.

    Raises:
        Refused: logits or the bank are missing (`adapter-incomplete`) or do not fit (`adapter-shape`), or the rank is
            not the config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    rank, count, length = site.field("r"), site.field("num_vectors"), site.field("vector_length")
    if outputs % length or inputs % length:
        raise site.misfit(site.base["weight"].shape, f"vectors of {length}")
    bank = site.fitting("vblora_vector_bank", site.common("vblora_vector_bank"), count, length)
    topk = site.field("topk")
    is_short = site.field("save_only_topk_weights")
    first = site.take(f"{_SIDES[0]}_{_CHOICE[0]}" if is_short else _SIDES[0])
    site.expect_rank(rank, first.info.shape[0] if first.info.shape else 0)
    places = ((rank, inputs // length), (outputs // length, rank))
    factors = [bank]
    for side, place in zip(_SIDES, places, strict=True):
        if is_short:
            factors += [
                site.shaped(f"{side}_{_CHOICE[0]}", *place, topk),
                site.shaped(f"{side}_{_CHOICE[1]}", *place, topk - 1),
            ]
        else:
            factors.append(site.shaped(side, *place, count))
    site.nothing_beside(*(f"{s}_{c}" for s in _SIDES for c in _CHOICE) if is_short else _SIDES)
    return (Update(KERNEL, tuple(factors), site.params(topk=topk), scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, the bank, and for A and B the logits, or which vectors are taken and all weights but the last."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        bank, *rest = factors
        half = len(rest) // 2
        a, b = (_mixed(bank, rest[i : i + half], int(params["topk"])) for i in (0, half))
        product = b.transpose(1, 2).reshape(-1, b.shape[1]) @ a.reshape(a.shape[0], -1)
        return product.T if params["transposed"] else product

    return added(inputs, params, change)


def _mixed(bank: Any, held: Tensors, topk: int) -> Any:
    import torch

    if len(held) == 2:
        places, weights = held[0].long(), held[1]
        weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), dim=-1)
        logits = torch.full((*weights.shape[:-1], len(bank)), float("-inf"), dtype=weights.dtype)
        logits = logits.scatter(-1, places, torch.log(weights))
    else:
        (logits,) = held
    best, places = logits.topk(topk, dim=-1)
    return (best.softmax(-1).unsqueeze(-1) * bank[places]).sum(-2)


def _memory(inputs: Infos) -> int:
    return 4 * sum(i.numel for i in inputs[2:]) * max(inputs[1].shape[-1], 1)


KERNEL = of_weight("vblora-merge", "vblora:merged", more=_memory)

METHOD = Method(
    title="VB-LoRA",
    peft_type="VBLORA",
    factors=(*_SIDES, *(f"{side}_{choice}" for side in _SIDES for choice in _CHOICE)),
    fields={
        **fields.of_training("vblora_dropout", "init_vector_bank_bound", "init_logits_std", only="vblora_only"),
        "r": fields.count(4),
        "num_vectors": fields.count(256),
        "vector_length": fields.count(256),
        "topk": fields.count(2),
        "save_only_topk_weights": fields.flag(),
    },
    update=update,
    shared=("vblora_vector_bank",),
    pairs=(_SIDES,),
    kernels=(KERNEL,),
)
