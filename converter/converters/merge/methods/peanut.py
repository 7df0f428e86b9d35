"""PEANuT: the update is what a small trained network makes of the weight.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/peanut/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "linear", "relu6", "mish", "quick_gelu")


def update(site: Site) -> tuple[Update, ...]:
    """`W + (network(W^T) * scaling)^T`.

    Raises:
        Refused: a layer of the network is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the
            rank is not the config's (`adapter-rank`).
    """
    outputs, _ = site.linear()
    rank, depth = site.field("r"), site.field("depth")
    a = site.take("peanut_A")
    site.expect_rank(rank, a.info.shape[0] if a.info.shape else 0)
    if site.is_turned:
        raise site.misfit(site.base["weight"].shape, "factors of PEANuT, which has none for such layers")
    inner = [f"peanut_{kind}.{n}" for kind in ("encoders", "decoders") for n in range(depth)]
    held = {_plain(name): name for name in site.module.factors}
    site.nothing_beside(*(held.get(name, name) for name in ("peanut_A", "peanut_B", *inner)))
    factors = [
        site.fitting("peanut_A", a, rank, outputs),
        site.shaped("peanut_B", outputs, rank),
        *(site.shaped(held.get(name, name), rank, rank) for name in inner),
    ]
    params = site.params(scale=site.field("scaling"), act=site.field("act_fn"))
    return (Update(KERNEL, tuple(factors), params),)


def _plain(name: str) -> str:
    """A factor's name without the last word, which is the tensor's in its layer."""
    return name.removesuffix(".weight")


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A `[r, out]`, B `[out, r]`, then the layers `[r, r]` of the encoder and of the decoder."""
    from torch.nn import functional
    from transformers.activations import ACT2FN

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b, *inner = factors
        act = ACT2FN[params["act"]]
        half = len(inner) // 2
        value, met = act(weight.transpose(0, 1) @ a.t()), []
        for layer in inner[:half]:
            met.append(value)
            value = act(functional.linear(value, layer))
        for layer, before in zip(inner[half:], reversed(met), strict=True):
            value = act(functional.linear(value, layer)) + before
        return (functional.linear(value, b) * params["scale"]).transpose(0, 1)

    return added(inputs, params, change, "update-first")


KERNEL = of_weight("peanut-merge", "peanut:merged")

METHOD = Method(
    title="PEANuT",
    peft_type="PEANUT",
    factors=("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
    fields={
        **fields.of_training(),
        "r": fields.count(32),
        "depth": fields.count(0, least=0),
        "scaling": fields.number(1.0),
        "act_fn": fields.choice(*_ACTIVATIONS),
    },
    update=update,
    zeros=("peanut_B",),
    is_linear=False,
    kernels=(KERNEL,),
)
