"""BOFT: inputs rotated by a product of butterfly factors, outputs scaled.

PEFT 0.11 and 0.12 save the permutation (`boft_P`) too, which the sizes give.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/boft/layer.py
"""

from __future__ import annotations

import math
from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos


def update(site: Site) -> tuple[Update, ...]:
    """`s * (W @ R^T)`, R the product of permuted block-diagonal rotations.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    site.nothing_beside("boft_R", "boft_s")
    outputs, inputs = site.sides
    r = site.take("boft_R")
    shape = r.info.shape
    factors, blocks, size = shape[:3] if len(shape) == 4 else (0, 0, 0)
    sound = factors > 0 and shape == (factors, blocks, size, size) and blocks * size == inputs
    # Without its CUDA extension PEFT trains one factor, whatever the config says.
    sound = sound and factors in (1, site.field("boft_n_butterfly_factor"))
    sound = sound and (factors == 1 or (size % 2 == 0 and blocks % 2 ** (factors - 1) == 0))
    if not sound:
        raise site.misfit(site.base["weight"].shape, f"boft_R {list(shape)}")
    is_kernel = len(site.base["weight"].shape) > 2
    s = site.shaped("boft_s", *((1, outputs) if is_kernel else (outputs, 1)))
    return (Update(KERNEL, (r, s), site.params()),)


def _memory(inputs: Infos) -> int:
    width = math.prod(inputs[0].shape[1:])
    return 3 * width * width


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, R `[factors, blocks, b, b]`, and the scales of the outputs."""
    from converter.core.compute.updates import replaced

    def new(weight: Any, factors: Tensors, params: Given) -> Any:
        r, s = factors
        flat = weight.T if params["transposed"] else weight.reshape(weight.shape[0], -1)
        turned = (_rotation(r) @ flat.t()).t() * s.reshape(-1, 1)
        return turned.T if params["transposed"] else turned.reshape(weight.shape)

    return replaced(inputs, params, new)


def _rotation(r: Any) -> Any:
    import torch

    count, blocks, size, _ = r.shape
    flat = r.view(count * blocks, size, size)
    skew = 0.5 * (flat - flat.transpose(1, 2))
    one = torch.eye(size, dtype=r.dtype).expand_as(skew)
    parts = torch.linalg.solve(one + skew, one - skew, left=False).view(r.shape)
    total = None
    for level in range(count):
        block_diag: Any = torch.block_diag
        factor = block_diag(*parts[level])
        if level:
            order = _butterfly(blocks * size, size, level)
            factor = factor[order][:, order]
        total = factor if total is None else factor @ total
    return total


def _butterfly(width: int, size: int, level: int) -> Any:
    """The order of a level's places: within each group of blocks the even halves of blocks, then the odd ones."""
    import torch

    half = size // 2
    halves = torch.arange(width).view(-1, size * 2**level // half, half)
    return torch.cat((halves[:, 0::2], halves[:, 1::2]), dim=1).reshape(-1)


KERNEL = of_weight("boft-merge", "boft:merged", more=_memory)

METHOD = Method(
    title="BOFT",
    peft_type="BOFT",
    factors=("boft_R", "boft_s", "boft_P"),
    fields={
        **fields.of_training("boft_block_size", "boft_block_num", "boft_dropout", only="boft_only"),
        "boft_n_butterfly_factor": fields.count(1),
    },
    update=update,
    layers="Linear, Conv2d",
    remark="several butterfly factors, which PEFT itself takes with CUDA only",
    pairs=(("boft_R", "boft_s"),),
    training=("boft_P",),
    is_linear=False,
    kernels=(KERNEL,),
)
