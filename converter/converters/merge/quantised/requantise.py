"""Changed weights written back in the format that they had, by the vendor's rule for scales: FP8 in blocks, MXFP4."""

from __future__ import annotations

from collections.abc import Sequence

from converter.converters.merge.quantised.whole import Whole
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes
from converter.core.tensors import quantised_specs as kernels
from converter.core.tensors.dtypes import DType
from converter.core.tensors.kernel_specs import Param
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.quantised.weight import Weight
from converter.text import show

_MATRIX = 2


def requantised(held: Whole, result: Checkpoint, changed: Sequence[str], context: Context) -> Checkpoint:
    """What a step made of whole weights, with the changed ones as codes and scales, the others as they lay.

    Raises:
        Refused: a changed weight is in a format that is not written here (`quantised-unsupported`).
    """
    weights = {w.name: w for w, _ in held.found.weights}
    made: dict[str, LazyTensor] = {}
    for name in changed:
        made |= _parts(weights[name], result.tensors[name], held)
    text = (
        f"{len(changed)} merged weights are written back quantised, rounded a second time; the receipt has each error"
    )
    context.note("changes-numbers", "requantised", text)
    return held.as_it_lay(result, made)


def _parts(weight: Weight, value: LazyTensor, held: Whole) -> dict[str, LazyTensor]:
    """Codes and scales of a weight, from its values in 32 bits; the codes measure what is left of the update."""
    before = held.before
    exact, old = nodes.recast(value, DType.F32), held.after.tensors[weight.name]
    if weight.scheme == "MXFP4":
        blocks, scales = weight.parts["blocks"], weight.parts["scales"]
        return {
            blocks: nodes.apply(kernels.QUANTISE_MXFP4_BLOCKS, [exact, old], {}),
            scales: nodes.apply(kernels.QUANTISE_MXFP4_SCALES, [exact], {}),
        }
    block, scale = weight.params.get("block"), before.tensors[weight.parts.get("scale", weight.main)]
    is_written = weight.scheme.startswith("FP8 in blocks") and len(value.info.shape) == _MATRIX
    if not is_written or block is None or scale.info.dtype not in (DType.F32, DType.BF16):
        what = f"{show(weight.name)} is {weight.scheme}, which is not written back here; FP8 in blocks and MXFP4 are"
        raise Refused("quantised-unsupported", what, where=show(before.origin.asked), next="--dequantize instead")
    params: dict[str, Param] = {"rows": block[0], "columns": block[1], "out": scale.info.dtype.value}
    codes = before.tensors[weight.parts["weight"]]
    rows = {"first": 0, "count": value.info.shape[0]}
    return {
        weight.parts["weight"]: nodes.apply(kernels.QUANTISE_FP8_CODES, [exact, old, codes], {**params, **rows}),
        weight.parts["scale"]: nodes.apply(kernels.QUANTISE_FP8_SCALES, [exact], params),
    }
