"""WaveFT: a few wavelet coefficients of the update are trained, at places drawn from a seed.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/waveft/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.fourierft import places, spectrum
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight


def update(site: Site) -> tuple[Update, ...]:
    """`W` plus the inverse wavelet transform of the coefficients, or plus the coefficients themselves, scaled.

    Raises:
        Refused: as FourierFT's coefficients are.
    """
    held = spectrum(site, "waveft_spectrum")
    scale = site.field("scaling")
    params = site.params(
        scale=scale,
        seed=site.field("random_loc_seed"),
        wavelet=site.field("wavelet_family") if site.field("use_idwt") else "",
    )
    return (Update(KERNEL, (held,), params, scale=scale * site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and the coefficients `[n]`."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        shape = tuple(weight.shape[::-1] if params["transposed"] else weight.shape)
        positions = places(shape, len(factors[0]), int(params["seed"]))
        if params["wavelet"]:
            update = _transformed(factors[0], positions, shape, str(params["wavelet"])) * params["scale"]
            update = _middle(update, shape)
        else:
            update = torch.zeros(shape, dtype=factors[0].dtype)
            update[tuple(positions)] = factors[0]
            update = update * params["scale"]
        return update.T if params["transposed"] else update

    return added(inputs, params, change)


def _transformed(values: Any, positions: Any, shape: tuple[int, ...], wavelet: str) -> Any:
    """One level of the inverse transform, by PEFT's own code, of coefficients in the middle of an even frame."""
    import torch
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.waverec2d import waverec2d

    frame = [n + more + (n + more) % 2 for n, more in zip(shape, WAVELET_REDUCTIONS[wavelet], strict=True)]
    moved = positions + torch.tensor([(f - n) // 2 for f, n in zip(frame, shape, strict=True)]).unsqueeze(1)
    inside = (moved[0] < frame[0]) & (moved[1] < frame[1])
    dense = torch.zeros(frame, dtype=values.dtype)
    dense[tuple(moved[:, inside])] = values[inside]
    half = [f // 2 for f in frame]
    (a, h), (v, d) = ((row[:, : half[1]], row[:, half[1] :]) for row in (dense[: half[0]], dense[half[0] :]))
    return waverec2d((a, (h, v, d)), wavelet)


def _middle(update: Any, shape: tuple[int, ...]) -> Any:
    start = [(have - want) // 2 for have, want in zip(update.shape, shape, strict=True)]
    return update[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]]


KERNEL = of_weight("waveft-merge", "waveft:merged", copies=10)

METHOD = Method(
    title="WaveFT",
    peft_type="WAVEFT",
    factors=("waveft_spectrum",),
    fields={
        **fields.of_training(only="waveft_only"),
        "n_frequency": fields.count(2592),
        "n_frequency_pattern": fields.pattern(int),
        "scaling": fields.number(25.0),
        "random_loc_seed": fields.count(777, least=0),
        "use_idwt": fields.flag(True),
        "wavelet_family": fields.Field(lambda value, key, where: str(value or "db1")),
        "proportional_parameters": fields.flag(),
    },
    update=update,
    zeros=("waveft_spectrum",),
    kernels=(KERNEL,),
)
