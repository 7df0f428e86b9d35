"""C3A: an update of circulant blocks.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/c3a/layer.py and utils.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos


def update(site: Site) -> tuple[Update, ...]:
    """`W + circulant(kernel) / in`, block by block.

    Raises:
        Refused: the kernel is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    outputs, inputs = site.linear()
    kernel = site.take("c3a_kernel")
    shape = kernel.info.shape
    size = shape[2] if len(shape) == 3 else 0
    said = {site.field("block_size"), *site.field("block_size_pattern").values()}
    if site.is_turned or size not in said or shape != (outputs // size, inputs // size, size):
        raise site.misfit(site.base["weight"].shape, f"c3a_kernel {list(shape)}, with blocks of {sorted(said)}")
    if outputs % size or inputs % size:
        raise site.misfit(site.base["weight"].shape, f"c3a_kernel {list(shape)}")
    return (Update(KERNEL, (kernel,), site.params(), scale=site.weight),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and the first columns of the blocks, `[out / b, in / b, b]`."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        if params["numerics"] == "peft":
            return _by_transform(factors[0].float()).to(weight.dtype) / weight.shape[-1]
        return _spread(factors[0]) / weight.shape[-1]

    return added(inputs, params, change, "own-dtype")


def _by_transform(kernel: Any) -> Any:
    """The blocks as PEFT computes them, by Fourier transforms of the unit matrix."""
    import torch

    _, count, size = kernel.shape
    one = torch.eye(count * size, dtype=kernel.dtype).reshape(count * size, count, size)
    product = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(one), torch.fft.fft(kernel))
    return torch.fft.fft(product).real.flatten(start_dim=1).T


def _spread(kernel: Any) -> Any:
    """The blocks by copying: the element of a row and a column is that of their difference."""
    import torch

    high, wide, size = kernel.shape
    place = (torch.arange(size).unsqueeze(0) - torch.arange(size).unsqueeze(1)) % size
    return kernel[:, :, place].permute(0, 2, 1, 3).reshape(high * size, wide * size)


def _memory(inputs: Infos) -> int:
    high, wide = inputs[0].shape
    return 4 * wide * (wide + high)


KERNEL = of_weight("c3a-merge", "c3a:merged", more=_memory)

METHOD = Method(
    title="C3A",
    peft_type="C3A",
    factors=("c3a_kernel",),
    fields={
        **fields.of_training(only="c3a_only"),
        "block_size": fields.count(256),
        "block_size_pattern": fields.pattern(int),
    },
    update=update,
    zeros=("c3a_kernel",),
    kernels=(KERNEL,),
)
