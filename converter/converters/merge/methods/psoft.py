"""PSOFT: a trained rotation within the weight's first singular directions.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/psoft/layer.py
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.oft import cayley_series
from converter.converters.merge.methods.site_kernels import Given, Tensors, decomposed, of_weight

_MAGNITUDES = ("psoft_R.vector_b", "psoft_R.vector_a")


def update(site: Site) -> tuple[Update, ...]:
    """`W + B (R - I) A * alpha / r`, A and B being the first r singular directions of W.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    outputs, inputs = site.linear()
    rank = site.field("r")
    if site.is_turned or rank > min(outputs, inputs):
        raise site.misfit(site.base["weight"].shape, f"a rotation of rank {rank}")
    shape = (rank * (rank - 1) // 2,) if site.field("psoft_orth") else (rank, rank)
    factors = [site.shaped("psoft_R", *shape)]
    lengths = [name for name, key in zip(_MAGNITUDES, ("psoft_mag_b", "psoft_mag_a"), strict=True) if site.field(key)]
    factors += [site.shaped(name, rank) for name in lengths]
    site.nothing_beside("psoft_R", *lengths)
    params = site.params(
        rank=rank,
        scale=site.field("psoft_alpha") / rank,
        split=site.field("ab_svd_init") == "pissa_init",
        steps=site.field("psoft_svd_lowrank_niter") if site.field("psoft_svd") == "lowrank" else -1,
        seed=site.field("random_seed"),
        orthogonal=site.field("psoft_orth"),
        terms=site.field("num_cayley_neumann_terms") if site.field("use_cayley_neumann") else 0,
        eps=site.field("cayley_neumann_eps"),
        lengths=tuple(name[-1] for name in lengths),
    )
    return (Update(KERNEL, tuple(factors), params),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, the rotation's elements, and lengths before and after it where there are some."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        elements, *lengths = factors
        rotation = _rotation(elements, params)
        for side, length in zip(params["lengths"], lengths, strict=True):
            rotation = length[:, None] * rotation if side == "b" else rotation * length[None, :]
        a, b = (x.to(weight.dtype) for x in _directions(weight.to(torch.float32), params))
        one = torch.eye(len(rotation), dtype=weight.dtype)
        return b @ (rotation - one) @ a * params["scale"]

    return added(inputs, params, change, "update-first")


def _directions(weight: Any, params: Given) -> tuple[Any, Any]:
    import torch

    rank, steps = int(params["rank"]), int(params["steps"])
    if steps < 0:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, vh = _approximate(weight, rank, steps, int(params["seed"]))
    s = s / params["scale"]
    if params["split"]:
        root = torch.diag(torch.sqrt(s))
        return (root @ vh).contiguous(), (u @ root).contiguous()
    return vh.contiguous(), (u @ torch.diag(s)).contiguous()


def _approximate(weight: Any, rank: int, steps: int, seed: int) -> tuple[Any, Any, Any]:
    """The first directions by random projections, as `torch.svd_lowrank` finds them, with a generator of its own.

    torch draws from the one generator of the process, which threads share. The algorithm is 5.1 of Halko et al., 2009.
    """
    import torch

    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    drawn = torch.randn(tall.shape[1], rank, generator=torch.Generator().manual_seed(seed), dtype=tall.dtype)
    basis = torch.linalg.qr(tall @ drawn).Q
    for _ in range(steps):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u = basis @ u
    return (u, s, vh) if tall is weight else (vh.mT, s, u.mT)


def _rotation(elements: Any, params: Given) -> Any:
    import torch

    if not params["orthogonal"]:
        return elements
    size = int(params["rank"])
    rows, columns = torch.triu_indices(size, size, 1)
    matrix = torch.zeros(size, size, dtype=elements.dtype).index_put((rows, columns), elements)
    skew = matrix - matrix.transpose(0, 1)
    one = torch.eye(size, dtype=elements.dtype)
    if not params["terms"]:
        return torch.linalg.solve(one - skew, one + skew, left=False)
    limit, length = float(params["eps"]), torch.linalg.norm(skew, ord="fro")
    if limit and length > limit:
        skew = skew * (limit / (length + 1e-12))
    return cayley_series(skew.unsqueeze(0), int(params["terms"]))[0]


KERNEL = of_weight("psoft-merge", "psoft:merged", more=decomposed(2))

METHOD = Method(
    title="PSOFT",
    peft_type="PSOFT",
    factors=("psoft_R",),
    fields={
        **fields.of_training("psoft_dropout", only="psoft_only"),
        "r": fields.count(32),
        "psoft_alpha": fields.number(32),
        "ab_svd_init": fields.choice("psoft_init", "pissa_init"),
        "psoft_svd": fields.choice("full", "lowrank"),
        "psoft_svd_lowrank_niter": fields.count(10, least=0),
        "random_seed": fields.count(0, least=0),
        "psoft_orth": fields.flag(True),
        "psoft_mag_a": fields.flag(True),
        "psoft_mag_b": fields.flag(True),
        "use_cayley_neumann": fields.flag(),
        "num_cayley_neumann_terms": fields.count(5),
        "cayley_neumann_eps": fields.number(0),
    },
    update=update,
    remark="singular directions of the base are computed again, as PEFT does",
    is_linear=False,
    kernels=(KERNEL,),
)
