"""OSF: the weight's last singular directions are trained, the first ones kept.

Before 0.21 PEFT put the weight together of its directions, which it kept in the base's dtype: a 16-bit base is moved by
their rounding, in training too.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/osf/layer.py and utils.py, and
https://github.com/huggingface/peft/blob/v0.20.0/src/peft/tuners/osf/utils.py#L62-L81
"""

from __future__ import annotations

from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, decomposed, of_weight
from converter.core.tensors.dtypes import DType

_NAMES = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")


def update(site: Site) -> tuple[Update, ...]:
    """`W + U S V - U0 S0 V0`, the latter being what W has outside of its first directions.

    Raises:
        Refused: a factor is missing (`adapter-incomplete`) or does not fit (`adapter-shape`).
    """
    outputs, inputs = site.linear()
    low = site.take(_NAMES[1]).info.numel
    kept = min(outputs, inputs) - low
    if site.is_turned or kept <= 0:
        raise site.misfit(site.base["weight"].shape, f"{low} singular values")
    factors = (
        site.shaped(_NAMES[0], outputs, low),
        site.shaped(_NAMES[1], low),
        site.shaped(_NAMES[2], low, inputs),
    )
    release, dtype = site.config.release, site.base["weight"].dtype
    is_rebuilt = release is not None and release < (0, 21) and dtype in (DType.BF16, DType.F16)
    return (Update(KERNEL, factors, site.params(kept=kept, base=dtype.value, rebuilt=is_rebuilt)),)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W, U `[out, n]`, S `[n]` and V `[n, in]`."""
    import torch

    from converter.core.compute.updates import added

    def change(weight: Any, factors: Tensors, params: Given) -> Any:
        u, s, v = factors
        kept, base = int(params["kept"]), getattr(torch, DType(params["base"]).torch_name)
        first = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
        part = slice(None, kept) if params["rebuilt"] else slice(kept, None)
        u0, s0, v0 = (x.contiguous() for x in (first[0][:, part], first[1][part], first[2][part]))
        u0, s0, v0 = (x.to(base).to(weight.dtype) for x in (u0, s0, v0))
        own, other = torch.mm(u * s.unsqueeze(0), v), torch.mm(u0 * s0.unsqueeze(0), v0)
        return other + own - weight if params["rebuilt"] else own - other

    return added(inputs, params, change)


KERNEL = of_weight("osf-merge", "osf:merged", more=decomposed(4))

METHOD = Method(
    title="OSF",
    peft_type="OSF",
    factors=("osf_svd_params",),
    fields=fields.of_training("effective_rank", "rank_pattern", "target_svd_config"),
    update=update,
    remark="singular directions of the base are computed again, as PEFT does",
    is_linear=False,
    kernels=(KERNEL,),
)
