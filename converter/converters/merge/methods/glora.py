"""GLoRA: weights and biases scaled, shifted and mixed by paths that are low-rank matrices, vectors or numbers.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/glora/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.nodes import LazyTensor

Shape = tuple[int, ...]

_PARTS = ("Xd", "Xu", "X", "zeros")


def update(site: Site) -> tuple[Update, ...]:
    """`W + W * A + B`, and `b + b * D + E + W @ C`.

    Raises:
        Refused: a path is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    outputs, inputs = site.linear()
    if site.is_turned:
        raise site.misfit(site.base["weight"].shape, "factors of GLoRA, which has none for such layers")
    rank = site.field("r")
    whole = (outputs, inputs)
    of_weights = [_path(site, name, whole, (outputs, 1), (outputs, rank), (rank, inputs)) for name in "AB"]
    mixing = _path(site, "C", (inputs, 1), (inputs, 1), (inputs, rank), (rank, 1))
    of_biases = [mixing, *(_path(site, name, (outputs,), (outputs,), (), ()) for name in "DE")]
    found = [Update(KERNEL, _laid(of_weights), site.params(forms=tuple(len(p) for p in of_weights)))]
    if "bias" in site.base and site.below:
        inputs_of_bias = (site.below["weight"], *_laid(of_biases))
        forms = tuple(len(p) for p in of_biases)
        found.append(Update(BIAS_KERNEL, inputs_of_bias, site.params("bias", forms=forms), "bias"))
    else:
        # What stands in the file for a bias that is not there is read and used for nothing.
        found[0] = Update(KERNEL, (*found[0].inputs, *_laid(of_biases)), found[0].params)
    return tuple(found)


def _path(site: Site, name: str, zeros: Shape, vector: Shape, down: Shape, up: Shape) -> tuple[LazyTensor, ...]:
    """A path's tensors: two of low rank, a vector or number, or zeros."""
    held = {part: f"glora_{name}.{part}" for part in _PARTS if f"glora_{name}.{part}" in site.module.factors}
    if held.keys() == {"Xd", "Xu"} and down:
        site.expect_rank(site.field("r"), site.take(held["Xd"]).info.shape[-1])
        return site.shaped(held["Xd"], *down), site.shaped(held["Xu"], *up)
    if held.keys() == {"zeros"}:
        return (site.shaped(held["zeros"], *zeros),)
    if held.keys() == {"X"}:
        is_number = site.take(held["X"]).info.shape == (1,)
        return (site.shaped(held["X"], *((1,) if is_number else vector)),)
    raise site.incomplete(f"glora_{name} has {', '.join(held) or 'nothing'}")


def _laid(paths: list[tuple[LazyTensor, ...]]) -> tuple[LazyTensor, ...]:
    return tuple(tensor for path in paths for tensor in path)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, then the tensors of A and of B."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b = _values(factors, params)
        return weight * a.to(weight.dtype) + b.to(weight.dtype)

    return added(inputs, params, change, "own-dtype")


def merged_bias(inputs: Tensors, params: Given) -> Any:
    """The kernel: a bias, W, then the tensors of C, D and E."""
    from converter.core.compute.updates import added

    def change(bias: Any, factors: Tensors, params: Given) -> Any:
        weight, *rest = factors
        c, d, e = (value.to(bias.dtype) for value in _values(rest, params))
        return bias * d + e + (weight.to(bias.dtype) @ c).squeeze(-1)

    return added(inputs, params, change, "own-dtype")


def _values(factors: Tensors, params: Given) -> Tensors:
    found, rest = [], iter(factors)
    for count in params["forms"]:
        held = [next(rest) for _ in range(count)]
        found.append(held[0] @ held[1] if count == 2 else held[0])
    return found


KERNEL = of_weight("glora-merge", "glora:merged")
BIAS_KERNEL = of_weight("glora-bias-merge", "glora:merged_bias")

METHOD = Method(
    title="GLoRA",
    peft_type="GLORA",
    factors=tuple(f"glora_{name}.{part}" for name in "ABCDE" for part in _PARTS),
    fields={
        **fields.of_training("config_A_B", "config_C", "config_D_E", only="glora_only"),
        "r": fields.count(8),
    },
    update=update,
    zeros=tuple(f"glora_{name}.{part}" for name in "ABCDE" for part in ("Xd", "X", "zeros")),
    is_linear=False,
    kernels=(KERNEL, BIAS_KERNEL),
)
