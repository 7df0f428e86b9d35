"""MiSS: one small block is added to every stretch of inputs; `bat` multiplies too.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/miss/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Rows, Tensors, of_weight
from converter.core.tensors.kernel_specs import Infos, Params


def _form(value: Any, key: str, where: str) -> str:
    """`plain`, `bat` or `mini`: how the block is spread."""
    if value in ("bat", "mini"):
        return str(value)
    if value is None or isinstance(value, bool):
        return "plain"
    raise fields.malformed(key, value, where, "true, false, bat or mini")


def update(site: Site) -> tuple[Update, ...]:
    """`W[:, j r + i] += M[i]`; with `bat`, `W + W @ M + M` over blocks `[r, r]`.

    Raises:
        Refused: the block is missing (`adapter-incomplete`) or does not fit (`adapter-shape`), or the rank is not
            the config's (`adapter-rank`).
    """
    name = site.config.method.factors[0]
    outputs, inputs = site.linear()
    rank, form, block = site.field("r"), site.field("init_weights"), site.take(name)
    shape = block.info.shape
    site.expect_rank(rank, shape[-1 if form == "bat" else 0] if shape else 0)
    mini = site.config.fields.get("mini_r", 1) if form == "mini" else outputs
    divides = outputs % rank == 0 and inputs % rank == 0 if form == "bat" else outputs % mini == 0 and rank <= inputs
    if site.is_turned or not divides:
        raise site.misfit(site.base["weight"].shape, f"{name} {list(shape)} of form {form}")
    wanted = (outputs // rank, rank, rank) if form == "bat" else (rank, mini)
    params = site.params(form=form)
    return (Update(KERNEL, (site.fitting(name, block, *wanted),), params, scale=site.weight),)


def _rows(inputs: Infos, params: Params) -> Rows:
    return (1,) if params["form"] == "plain" else (None,)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and the block, `[r, out]`, `[r, mini]` or `[out / r, r, r]`."""
    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        (block,) = factors
        high, wide = weight.shape
        if params["form"] == "bat":
            r = block.shape[-1]
            cut = weight.reshape(high // r, r, wide // r, r).permute(2, 0, 1, 3)
            return (cut @ block + block).permute(1, 2, 0, 3).reshape(weight.shape)
        block = block.repeat(1, high // block.shape[1])
        return block.T.repeat(1, -(-wide // len(block)))[:, :wide]

    return added(inputs, params, change)


KERNEL = of_weight("miss-merge", "miss:merged", _rows)

METHOD = Method(
    title="MiSS",
    peft_type="MISS",
    factors=("miss_block",),
    fields={
        **fields.of_training("miss_dropout", only="MiSS_only"),
        "r": fields.count(64),
        "mini_r": fields.count(1),
        "init_weights": fields.Field(_form),
    },
    update=update,
    zeros=("miss_block",),
    kernels=(KERNEL,),
)
