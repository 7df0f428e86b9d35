"""HiRA: the weight is multiplied, element by element, by one plus a low-rank matrix.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/hira/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight

_PAIR = ("hira_A", "hira_B")
_EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


def update(site: Site) -> tuple[Update, ...]:
    """`W + W * (B @ A)`.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not the
            config's (`adapter-rank`).
    """
    shape = site.base["weight"].shape
    is_embedding = not site.module.factors.keys().isdisjoint(_EMBEDDING)
    names = _EMBEDDING if is_embedding else _PAIR
    site.nothing_beside(*names)
    rank, a = site.matched("rank_pattern", "r"), site.take(names[0])
    site.expect_rank(rank, a.info.shape[0] if a.info.shape else 0)
    if len(shape) > 2:
        sizes = ((rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2)))
    else:
        outputs, inputs = shape[::-1] if is_embedding else site.linear()
        sizes = ((rank, inputs), (outputs, rank))
    factors = tuple(site.shaped(name, *size) for name, size in zip(names, sizes, strict=True))
    params = site.params(transposed=is_embedding or site.is_turned)
    return (Update(KERNEL, factors, params),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, A and B, of a matrix or of a convolution."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        a, b = factors
        product = (b @ a) if a.dim() == 2 else _convolved(a, b)
        product = product.T if params["transposed"] else product
        return weight * product.to(weight.dtype)

    return added(inputs, params, change, "own-dtype")


def _convolved(a: Any, b: Any) -> Any:
    import torch

    if a.shape[2:] == (1, 1):
        return (b.squeeze(3).squeeze(2) @ a.squeeze(3).squeeze(2)).unsqueeze(2).unsqueeze(3)
    convolve = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}[a.dim()]
    return convolve(a.transpose(0, 1), b).transpose(0, 1)


KERNEL = of_weight("hira-merge", "hira:merged", (None, 0))

METHOD = Method(
    title="HiRA",
    peft_type="HIRA",
    factors=(*_PAIR, *_EMBEDDING),
    fields={
        **fields.of_training("hira_dropout"),
        "r": fields.count(32),
        "rank_pattern": fields.pattern(int),
    },
    update=update,
    pairs=(_PAIR, _EMBEDDING),
    zeros=("hira_B", "hira_embedding_A"),
    is_linear=False,
    kernels=(KERNEL,),
)
