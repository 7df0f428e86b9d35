"""IA3: outputs, or a feedforward layer's inputs, multiplied by a trained vector.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/ia3/layer.py
"""

from __future__ import annotations

import re
from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Update
from converter.converters.merge.methods.site_kernels import Given, Tensors, of_weight
from converter.converters.merge.patterns import is_tame_regex
from converter.core.tensors import nodes as tensors
from converter.core.tensors.kernel_specs import Infos, Params
from converter.core.tensors.nodes import LazyTensor


def _modules(value: Any, key: str, where: str) -> str | tuple[str, ...] | None:
    """Names, or one pattern, of feedforward modules; None where the config does not say."""
    if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return None if value is None else tuple(value)
    if isinstance(value, str) and is_tame_regex(value):
        return value
    raise fields.malformed(key, value, where, "a list of module names, or a plain regular expression")


def update(site: Site) -> tuple[Update, ...]:
    """`W * l` along its inputs in a feedforward layer; else along its outputs, and the bias too.

    Raises:
        Refused: the vector is missing (`adapter-incomplete`), or does not fit (`adapter-shape`).
    """
    vector, shape = site.take("ia3_l"), site.base["weight"].shape
    is_feedforward = _is_feedforward(site, vector)
    length = vector.info.numel
    if is_feedforward:
        along = 0 if site.is_turned else 1
        groups = length // shape[1] if len(shape) > 2 and shape[1] and length % shape[1] == 0 else 1
        if len(shape) > 2 and groups > 1 and shape[0] % groups == 0:
            return (Update(KERNEL, (_grouped(vector, shape, groups),), site.params()),)
    else:
        along = 1 if site.is_turned else 0
    if length != shape[along]:
        raise site.misfit(shape, f"ia3_l {list(vector.info.shape)}")
    spread = tensors.reshape(vector, tuple(length if dim == along else 1 for dim in range(len(shape))))
    found = [Update(KERNEL, (spread,), site.params())]
    if not is_feedforward and "bias" in site.base:
        bias = site.base["bias"].shape
        if bias != (length,):
            raise site.misfit(bias, f"ia3_l {list(vector.info.shape)} for a bias")
        found.append(Update(KERNEL, (tensors.reshape(vector, bias),), site.params("bias", transposed=False), "bias"))
    return tuple(found)


def _grouped(vector: LazyTensor, shape: tuple[int, ...], groups: int) -> LazyTensor:
    """A vector over the inputs of a grouped convolution, spread as its weight is: each group has inputs of its own."""
    ones = (1,) * (len(shape) - 2)
    height = shape[0] // groups
    pieces = [tensors.narrow(tensors.reshape(vector, (groups, shape[1], *ones)), 0, g, 1) for g in range(groups)]
    return tensors.concat([piece for piece in pieces for _ in range(height)], 0)


def _is_feedforward(site: Site, vector: LazyTensor) -> bool:
    """What the vector's own shape says, or, of a convolution's, what the config says."""
    outputs, inputs = site.sides
    named = site.field("feedforward_modules")
    name = site.module.name
    if isinstance(named, str):
        said = re.fullmatch(named, name) is not None
    else:
        said = any(name.endswith(end) for end in named or ())
    if len(site.base["weight"].shape) > 2:
        return said
    shape = vector.info.shape
    if shape not in {(1, inputs), (outputs, 1)}:
        raise site.misfit(site.base["weight"].shape, f"ia3_l {list(shape)}")
    told = shape == (1, inputs) and (shape != (outputs, 1) or said)
    if named is not None and told != said:
        where = "among" if said else "not among"
        raise site.misfit(site.base["weight"].shape, f"ia3_l {list(shape)} of a module {where} feedforward_modules")
    return told


def _rows(inputs: Infos, params: Params) -> tuple[int | None, ...]:
    return (0 if inputs[1].shape and inputs[1].shape[0] == inputs[0].shape[0] else None,)


def merged(inputs: Tensors, params: Given) -> Any:
    """The kernel: W and a vector that is spread over it."""
    from converter.core.compute.updates import replaced

    return replaced(inputs, params, lambda weight, factors, params: weight * factors[0])


KERNEL = of_weight("ia3-merge", "ia3:merged", _rows)

METHOD = Method(
    title="IA3",
    peft_type="IA3",
    factors=("ia3_l",),
    fields={**fields.of_training("init_ia3_weights"), "feedforward_modules": fields.Field(_modules)},
    update=update,
    layers="Linear, Conv1D, Conv2d, Conv3d",
    remark="biases are scaled with outputs",
    is_linear=False,
    kernels=(KERNEL,),
)
