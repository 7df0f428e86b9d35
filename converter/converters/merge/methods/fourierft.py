"""FourierFT: a few coefficients of the update's spectrum are trained, at places drawn from a seed.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/fourierft/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.text import show


def spectrum(site: Site, name: str) -> LazyTensor:
    """The trained coefficients, as many as the config says for some module.

    Raises:
        Refused: they are missing (`adapter-incomplete`), do not fit (`adapter-shape`), or are of another number
            than the config's (`adapter-rank`).
    """
    outputs, inputs = site.linear()
    held = site.take(name)
    count = held.info.numel
    said = {site.field("n_frequency"), *site.field("n_frequency_pattern").values()}
    if len(held.info.shape) != 1 or count > outputs * inputs:
        raise site.misfit(site.base["weight"].shape, f"{name} {list(held.info.shape)}")
    if count not in said:
        what = f"{show(site.module.name)} has {count} coefficients, and adapter_config.json lists other numbers"
        raise Refused("adapter-rank", what, where=site.where, expected=" or ".join(map(str, sorted(said))))
    return held


def update(site: Site) -> tuple[Update, ...]:
    """`W + real(ifft2(S)) * scaling`.

    Raises:
        Refused: see `spectrum`.
    """
    held = spectrum(site, "fourierft_spectrum")
    scale = site.field("scaling")
    params = site.params(scale=scale, seed=site.field("random_loc_seed"))
    return (Update(KERNEL, (held,), params, scale=scale * site.weight),)


def places(shape: tuple[int, ...], count: int, seed: int) -> Any:
    """Rows and columns of the coefficients: the first places of a permutation of all."""
    import torch

    drawn = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack((drawn // shape[1], drawn % shape[1]))


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and the coefficients `[n]`."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        shape = tuple(weight.shape[::-1] if params["transposed"] else weight.shape)
        rows, columns = places(shape, len(factors[0]), int(params["seed"]))
        dense = torch.zeros(shape, dtype=factors[0].dtype)
        dense[rows, columns] = factors[0]
        update = torch.fft.ifft2(dense).real * params["scale"]
        return update.T if params["transposed"] else update

    return added(inputs, params, change)


KERNEL = of_weight("fourierft-merge", "fourierft:merged", copies=8)

METHOD = Method(
    title="FourierFT",
    peft_type="FOURIERFT",
    factors=("fourierft_spectrum",),
    fields={
        **fields.of_training(only="fourier_only"),
        "n_frequency": fields.count(1000),
        "n_frequency_pattern": fields.pattern(int),
        "scaling": fields.number(150.0),
        "random_loc_seed": fields.count(777, least=0),
    },
    update=update,
    zeros=("fourierft_spectrum",),
    kernels=(KERNEL,),
)
