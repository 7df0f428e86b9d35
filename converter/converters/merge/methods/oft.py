"""OFT: inputs rotated by blocks, each the Cayley transform of a trained skew-symmetric matrix.

PEFT before 0.16 kept whole matrices (`oft_r`) and took the skew-symmetric half of each: 0.14 and 0.15 rotated inputs
and scaled outputs (`oft_s`), earlier ones rotated outputs. No later release loads these.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/oft/layer.py, and v0.15.2 and v0.13.2 there
"""

from __future__ import annotations

import math
from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos
from converter.errors import Refused
from converter.text import show


def update(site: Site) -> tuple[Update, ...]:
    """`W @ R^T`, R block-diagonal; an embedding's rows are `W @ R`.

    Raises:
        Refused: the rotation is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    if "oft_r" in site.module.factors:
        return _of_whole_matrices(site)
    name = "oft_embedding_R" if "oft_embedding_R" in site.module.factors else "oft_R"
    site.nothing_beside(name)
    factor, is_embedding = site.take(name), name == "oft_embedding_R"
    inputs = site.base["weight"].shape[-1] if is_embedding else site.sides[1]
    shape = factor.info.shape
    block = _block(shape[1]) if len(shape) == 2 else None
    is_shared = site.field("block_share")
    if block is None or (shape[0] * block != inputs and not (is_shared and shape[0] == 1 and inputs % block == 0)):
        raise site.misfit(site.base["weight"].shape, f"{name} {list(shape)}")
    if is_shared and shape[0] != 1:
        raise site.misfit(site.base["weight"].shape, f"{name} {list(shape)}, and block_share is set")
    if any(n != 1 for n in site.base["weight"].shape[2:]):
        what = "PEFT's forward adds up where windows of a kernel overlap, and no weight computes that"
        raise Refused("peft-type-unmergeable", f"OFT over {show(site.target)}: {what}", where=site.where)
    terms: int = site.field("num_cayley_neumann_terms") if site.field("use_cayley_neumann") else 0
    params = site.params(
        embedding=is_embedding,
        transposed=site.is_turned and not is_embedding,
        terms=terms,
        evenly=terms > 2 and _counts_evenly(site),
        coft=site.field("coft"),
        eps=site.field("eps"),
        block=block,
    )
    return (Update(KERNEL, (factor,), params),)


def _counts_evenly(site: Site) -> bool:
    """True where the last term of the series counts twice, as all others but the first: PEFT 0.16 and 0.17.

    Source: `_cayley_batch`, https://github.com/huggingface/peft/blob/v0.17.1/src/peft/tuners/oft/layer.py
    """
    release = site.config.release
    return release is not None and release < (0, 18)


def _of_whole_matrices(site: Site) -> tuple[Update, ...]:
    """What PEFT before 0.16 trained: `oft_r` `[blocks, b, b]`, and `oft_s` `[out, 1]` since 0.14."""
    blocks, scales = site.take("oft_r"), [site.module.factors["oft_s"]] if "oft_s" in site.module.factors else []
    site.nothing_beside("oft_r", "oft_s")
    outputs, inputs = site.sides
    count, block, other = blocks.info.shape if len(blocks.info.shape) == 3 else (0, 1, 0)
    width = inputs if scales else outputs
    wanted = 1 if site.field("block_share") else -(-width // block)
    fits = block == other and count == wanted and (not scales or inputs % block == 0)
    if not fits or site.is_turned or len(site.base["weight"].shape) not in (2, 4):
        raise site.misfit(site.base["weight"].shape, f"oft_r {list(blocks.info.shape)}")
    for scale in scales:
        site.fitting("oft_s", scale, outputs, 1)
    side = -(-outputs // (inputs // block)) if scales else block
    eps = float(site.field("eps")) * side * side
    params = site.params(coft=site.field("coft"), eps=eps, inputs=bool(scales))
    return (Update(WHOLE_KERNEL, (blocks, *scales), params),)


def _block(elements: int) -> int | None:
    """The size of a block that has so many elements above its diagonal."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else None


def _memory(inputs: Infos) -> int:
    width = math.prod(inputs[0].shape[1:])
    return 2 * width * width


def _whole_memory(inputs: Infos) -> int:
    width = max(inputs[0].shape[0], math.prod(inputs[0].shape[1:]))
    return 2 * width * width


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and the elements above the diagonals, `[blocks, b * (b - 1) / 2]`."""
    from converter.core.compute.updates import replaced

    def new(weight: Any, factors: Tensors, params: Given) -> Any:
        flat = weight.T if params["transposed"] else weight.reshape(weight.shape[0], -1)
        rotation = _rotation(factors[0], flat.shape[1] // int(params["block"]), params)
        turned = flat @ rotation if params["embedding"] else (rotation @ flat.t()).t()
        return turned.T if params["transposed"] else turned.reshape(weight.shape)

    return replaced(inputs, params, new)


def merged_whole(inputs: Tensors, params: Given) -> Any:
    """The kernel of older releases: W and whole matrices `[blocks, b, b]`, and scales of the outputs where inputs are
    what is rotated.
    """
    from converter.core.compute.updates import replaced

    def new(weight: Any, factors: Tensors, params: Given) -> Any:
        import torch

        matrices, flat = factors[0], weight.reshape(weight.shape[0], -1)
        if params["coft"]:
            matrices = _held(matrices, float(params["eps"]))
        size, width = matrices.shape[-1], flat.shape[1 if params["inputs"] else 0]
        blocks = _cayley(0.5 * (matrices - matrices.transpose(1, 2)))
        block_diag: Any = torch.block_diag
        rotation = block_diag(*(blocks[0 if len(blocks) == 1 else i] for i in range(-(-width // size))))
        rotation = rotation[:width, :width]
        turned = (rotation @ flat.t()).t() * factors[1] if params["inputs"] else (flat.t() @ rotation).t()
        return turned.reshape(weight.shape)

    return replaced(inputs, params, new)


def _rotation(elements: Any, count: int, params: Given) -> Any:
    import torch

    size = int(params["block"])
    if params["coft"]:
        elements = _within(elements, size, float(params["eps"]))
    skew = _skew(elements, size)
    series = _even_series if params["evenly"] else cayley_series
    blocks = series(skew, int(params["terms"])) if params["terms"] else _cayley(skew)
    block_diag: Any = torch.block_diag
    return block_diag(*(blocks[0 if len(blocks) == 1 else i] for i in range(count)))


def _skew(elements: Any, size: int) -> Any:
    import torch

    rows, columns = torch.triu_indices(size, size, 1)
    matrix = torch.zeros(len(elements), size, size, dtype=elements.dtype)
    matrix[:, rows, columns] = elements
    return matrix - matrix.transpose(-2, -1)


def _within(elements: Any, size: int, eps: float) -> Any:
    """Elements drawn back to where the matrix is at most so far from none (constrained OFT)."""
    import torch

    rows, columns = torch.triu_indices(size, size, 1)
    return _held(_skew(elements, size), eps)[:, rows, columns]


def _held(matrices: Any, eps: float) -> Any:
    import torch

    limit = eps * 1 / torch.sqrt(torch.tensor(matrices.shape[0]))
    length = torch.norm(matrices, dim=(1, 2), keepdim=True)
    return torch.where(length <= limit, matrices, limit * (matrices / length))


def cayley_series(skew: Any, terms: int) -> Any:
    """`I + 2 Q + 2 Q^2 + ...` of a batch, the last of the terms once."""
    import torch

    total = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    if terms > 1:
        total.add_(skew, alpha=2.0)
    if terms > 2:
        power = torch.bmm(skew, skew)
        total.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = torch.bmm(power, skew)
            total.add_(power, alpha=2.0)
        total.add_(torch.bmm(power, skew))
    return total


def _even_series(skew: Any, terms: int) -> Any:
    """`I + 2 Q + 2 Q^2 + ...`, so many terms: PEFT 0.16 and 0.17."""
    import torch

    power = one = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    total = one.clone()
    for _ in range(1, terms):
        power = torch.bmm(power, skew)
        total.add_(power, alpha=2.0)
    return total


def _cayley(skew: Any) -> Any:
    import torch

    one = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(one + skew, one - skew, left=False)


def _terms(value: Any, key: str, where: str) -> int:
    if value is None:
        return 5
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
        raise Refused("adapter-config", f"`{key}` is malformed", where=where, got=show(value), facts={"field": key})
    return value


KERNEL = of_weight("oft-merge", "oft:merged", (None,), more=_memory)
WHOLE_KERNEL = of_weight("oft-whole-merge", "oft:merged_whole", None, more=_whole_memory)

METHOD = Method(
    title="OFT",
    peft_type="OFT",
    factors=("oft_R", "oft_embedding_R", "oft_r", "oft_s"),
    fields={
        **fields.of_training("r", "oft_block_size", "module_dropout", only="oft_only"),
        "coft": fields.flag(),
        "eps": fields.number(6e-5),
        "block_share": fields.flag(),
        "use_cayley_neumann": fields.flag(True),
        "num_cayley_neumann_terms": fields.Field(_terms),
    },
    update=update,
    layers="Linear, Embedding, 1x1 convolutions",
    remark="larger kernels are refused: PEFT's own forward there is of no weight; PEFT 0.10 to 0.17 as they ran",
    zeros=("oft_R", "oft_embedding_R", "oft_r"),
    is_linear=False,
    kernels=(KERNEL, WHOLE_KERNEL),
)
