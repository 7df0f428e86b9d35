"""RoAd: pairs of outputs are rotated and scaled by trained angles and lengths.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/road/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos

_SIZES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}


def update(site: Site) -> tuple[Update, ...]:
    """`R @ W` and `R @ bias`, R of rotations within groups of outputs.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    outputs, _ = site.linear()
    group, variant = site.field("group_size"), site.field("variant")
    if site.is_turned or outputs % group or group % 2:
        raise site.misfit(site.base["weight"].shape, f"groups of {group}")
    times, parts = _SIZES[variant]
    factors = tuple(site.shaped(name, outputs * times // parts) for name in ("road_theta", "road_alpha"))
    more = {"group": group, "variant": variant}
    found = [Update(KERNEL, factors, site.params(**more))]
    if "bias" in site.base:
        found.append(Update(KERNEL, factors, site.params("bias", **more), "bias"))
    return tuple(found)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W or a bias, the angles and the lengths."""
    from converter.core.compute.updates import replaced

    def new(weight: Any, factors: Tensors, params: Given) -> Any:
        first, second = _columns(factors, params)
        if params["numerics"] == "peft":
            return _rotation(first, second, int(params["group"])).to(weight.dtype) @ weight
        halves = weight.reshape(-1, 2, int(params["group"]) // 2, *weight.shape[1:])
        turned = torch.stack((-halves[:, 1], halves[:, 0]), dim=1).reshape(weight.shape)
        along = (-1, *[1] * (weight.dim() - 1))
        # What PEFT rounds to the base's dtype is the rotation itself; here nothing is before the end.
        return first.view(along) * weight + second.view(along) * turned

    import torch

    return replaced(inputs, params, new, own_dtype=True)


def _columns(factors: Tensors, params: Given) -> tuple[Any, Any]:
    """Cosines and sines with their lengths, one for each output."""
    theta, alpha = factors
    group = int(params["group"])
    if params["variant"] == "road_1":
        theta, alpha = (f.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten() for f in (theta, alpha))
    if params["variant"] == "road_4":
        theta, alpha = (f.reshape(-1, 2, group) for f in (theta, alpha))
        return alpha[:, 0].flatten() * theta[:, 0].cos().flatten(), alpha[:, 1].flatten() * theta[:, 1].sin().flatten()
    return alpha * theta.cos(), alpha * theta.sin()


def _rotation(first: Any, second: Any, group: int) -> Any:
    """R as a matrix: the first column on its diagonal, the second beside it within each group."""
    import torch

    size, half = len(first), group // 2
    place = torch.arange(size).view(-1, 2, half)
    partner = place.flip(1).flatten()
    sign = torch.tensor([-1.0, 1.0], dtype=first.dtype).view(1, 2, 1).expand(place.shape).flatten()
    matrix = torch.diag(first)
    matrix[torch.arange(size), partner] = second * sign
    return matrix


def _memory(inputs: Infos) -> int:
    return 2 * inputs[0].shape[0] ** 2


KERNEL = of_weight("road-merge", "road:merged", more=_memory)

METHOD = Method(
    title="RoAd",
    peft_type="ROAD",
    factors=("road_theta", "road_alpha"),
    fields={
        **fields.of_training(),
        "variant": fields.choice("road_1", "road_2", "road_4"),
        "group_size": fields.count(64),
    },
    update=update,
    pairs=(("road_theta", "road_alpha"),),
    is_linear=False,
    kernels=(KERNEL,),
)
