"""LoRA over linear layers, transformers' Conv1D, embeddings and convolutions: `W + scale * B @ A`; rsLoRA's scale too.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py and `layer.py`.
"""

from __future__ import annotations

import math
import re
from typing import Any

from converter.converters.merge.methods import fields
from converter.converters.merge.methods.method import Method, Site, Start, Update
from converter.core.tensors import kernel_specs
from converter.core.tensors import nodes as tensors
from converter.core.tensors.kernel_specs import Param
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.families.words import LORA_EMBEDDING_PAIR, LORA_MAGNITUDE, LORA_MATRICES, LORA_PAIR
from converter.text import show

Shape = tuple[int, ...]

MAGNITUDE = LORA_MAGNITUDE

_HARMLESS_STARTS = frozenset({"gaussian", "orthogonal", "eva", "mica", "true", "false"})

_LOST_STARTS = {
    "corda": "the base was moved by covariances of the training data",
    "lora_ga": "the base was moved by gradients of the training data",
    "loftq": "the adapter belongs to a quantised base",
}

_REBUILT_STARTS = ("pissa", "olora")
"""PEFT computes what these moved out of the base again when it loads the adapter."""


def _start(value: Any, key: str, where: str) -> str:
    """`plain`, `mica`, `pissa` or `olora`."""
    word = str(value).lower()
    if value is None or word in _HARMLESS_STARTS:
        return "mica" if word == "mica" else "plain"
    if word in _REBUILT_STARTS:
        return word
    reason = _LOST_STARTS.get(word)
    if word.startswith("pissa_niter_"):
        reason = "the base was moved by a randomised SVD, which can't be drawn again"
    raise Refused(
        "adapter-base-moved" if reason else "adapter-field-unknown",
        f"{key} is {show(value)}: {reason or 'unknown'}",
        where=where,
        facts={"field": key},
        next=Steps(
            "merge into the base that training saved beside the adapter: ",
            Again(("--base", "DIR", "--base-is-residual")),
            "; or convert the adapter with PEFT's path_initial_model_for_weight_conversion",
        ),
    )


FIELDS = {
    "r": fields.count(8),
    "lora_alpha": fields.number(8),
    "use_rslora": fields.flag(),
    "lora_bias": fields.flag(),
    "init_lora_weights": fields.Field(_start, moves_base=True),
    "rank_pattern": fields.pattern(int),
    "alpha_pattern": fields.pattern(float),
    "corda_config": fields.ignored(),
    "eva_config": fields.ignored(),
    "fan_in_fan_out": fields.ignored(),
    "loftq_config": fields.ignored(),
    "lora_dropout": fields.ignored(),
    # Of unsloth: how the experts of a stack's lora_B are laid out; `merge/experts.py` reads it.
    # Source: https://github.com/unslothai/unsloth-zoo/pull/1232
    "lora_B_layout": fields.ignored(),
    # Of ms-swift 2: a dtype and LoRA+'s learning rates.
    # Source: https://github.com/modelscope/ms-swift/blob/v2.6.1/swift/tuners/peft.py (`LoraConfig`)
    "lora_dtype": fields.ignored(),
    "lorap_emb_lr": fields.ignored(),
    "lorap_lr_ratio": fields.ignored(),
    # Of ms-swift's own tuners, which also wrap several adapters at once.
    # Source: https://github.com/modelscope/ms-swift/blob/v2.6.1/swift/tuners/lora.py (`LoRAConfig`)
    "swift_type": fields.choice("LORA"),
    "model_key_mapping": fields.ignored(),
    "enable_lora": fields.ignored(),
    "use_merged_linear": fields.refused("ms-swift's merged linear layers have factors of their own shapes"),
    "use_qa_lora": fields.refused("QA-LoRA belongs to a quantised base"),
    "megatron_core": fields.ignored(),
    "qalora_group_size": fields.ignored(),
    "alora_invocation_tokens": fields.refused("activated LoRA switches on at certain tokens and can't be merged"),
    "arrow_config": fields.refused("Arrow routes between adapters at run time and can't be merged"),
    "layer_replication": fields.ranges(),
    "lora_ga_config": fields.refused("LoRA-GA moves the base by gradients that no file holds"),
    "megatron_config": fields.refused("Megatron's parallel layers are not implemented"),
    "target_parameters": fields.names(),
    "use_qalora": fields.refused("QA-LoRA belongs to a quantised base"),
}


def rank_of(site: Site) -> int:
    """The rank that the config gives the module, by its name in memory."""
    rank: int = site.matched("rank_pattern", "r")
    return rank


def scale_of(site: Site) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` with rank-stabilised LoRA."""
    alpha: float = site.matched("alpha_pattern", "lora_alpha")
    rank = rank_of(site)
    if site.config.is_older:
        _expect_one_key(site, alpha)
    return alpha / math.sqrt(rank) if site.field("use_rslora") else alpha / rank


def _expect_one_key(site: Site, alpha: float) -> None:
    """Refuse where PEFT before 0.14 gave the module another alpha: it took one key for the rank and for alpha.

    Source: https://github.com/huggingface/peft/blob/v0.13.2/src/peft/tuners/lora/model.py (`_create_and_replace`)
    """
    ranks, alphas = site.field("rank_pattern"), site.field("alpha_pattern")
    key = next((k for k in (*ranks, *alphas) if re.match(rf".*\.{k}$", site.module.name)), site.module.name)
    advice = 'give both patterns the same keys in adapter_config.json, or set "peft_version" to "0.14.0"'
    site.expect_one_rule("alpha", alphas.get(key, site.field("lora_alpha")), alpha, advice)


def update(site: Site) -> tuple[Update, ...]:
    """The update of the weight, and of the bias where `lora_B` has one.

    Raises:
        Refused: a factor is missing or has no meaning (`adapter-incomplete`), a shape does not fit
            (`adapter-shape`), the rank is not the config's (`adapter-rank`), a bias has no place (`adapter-bias`).
    """
    return lora_updates(site, magnitude=None)


def lora_updates(site: Site, magnitude: LazyTensor | None) -> tuple[Update, ...]:
    """LoRA's updates of a module; with DoRA's magnitudes `[out]` the weight is rescaled to them."""
    parts = site.module.factors.keys() - {"lora_B.bias", MAGNITUDE}
    is_embedding = not parts.isdisjoint(LORA_EMBEDDING_PAIR)
    names = LORA_EMBEDDING_PAIR if is_embedding else LORA_PAIR
    a, b = (site.take(name) for name in names)
    for name, factor in zip(names, (a, b), strict=True):
        if not factor.info.dtype.is_float:
            raise site.incomplete(f"{show(name)} is {factor.info.dtype.value}, and a factor is of floats")
    if parts - set(names):
        raise site.incomplete(f"{show(min(parts - set(names)))} has no place in a LoRA layer")
    base = site.base["weight"].shape
    site.expect_rank(_stored_rank(site, base), a.info.shape[0] if a.info.shape else 0)
    kind = _kind(site, a.info.shape, b.info.shape, base, is_embedding)
    is_transposed = kind in ("conv1d", "embedding")
    if magnitude is not None:
        outputs = base[1] if is_transposed else base[0]
        if magnitude.info.numel != outputs:
            raise site.incomplete(f"the magnitude has {magnitude.info.numel} elements, not {outputs}")
    factors = (a, b) if magnitude is None else (a, b, tensors.reshape(magnitude, (magnitude.info.numel,)))
    scale = scale_of(site)
    params: dict[str, Param] = {
        "scales": (scale * site.weight,),
        "dora": (magnitude is not None,),
        "numerics": site.numerics,
        "out": site.base["weight"].dtype.value,
    }
    found = _bias(site, scale)
    scales: dict[str, Any] = {"scale": scale * site.weight, "weighted": (site.weight, scale)}
    if kind == "conv":
        return (Update(kernel_specs.LORA_CONV_MERGE, factors, params, joins=True, **scales), *found)
    start = site.field("init_lora_weights") if kind in ("linear", "conv1d") else "plain"
    is_rounded = kind == "embedding" or start == "mica" or site.is_parameter
    params |= {"transposed": is_transposed, "delta_rounded": is_rounded and site.numerics == "peft"}
    moved = _moved(start, a.info.shape[0], scale, is_transposed)
    whole = Update(kernel_specs.LORA_MERGE, factors, params, start=moved, joins=True, **scales)
    return (whole, *found)


def _stored_rank(site: Site, base: Shape) -> int:
    """The rank that the factors have: those of a decomposition are no more than the matrix has rows or columns."""
    rank = rank_of(site)
    is_decomposed = len(base) == 2 and site.field("init_lora_weights") in _REBUILT_STARTS
    return min(rank, *base) if is_decomposed else rank


def _moved(start: str, rank: int, scale: float, is_transposed: bool) -> Start | None:
    if start not in _REBUILT_STARTS:
        return None
    return Start(kernel_specs.RESIDUAL_BASE, {"init": start, "rank": rank, "scale": scale, "transposed": is_transposed})


def _bias(site: Site, scale: float) -> tuple[Update, ...]:
    """`bias + scale * lora_B.bias`."""
    bias = site.module.factors.get("lora_B.bias")
    if bias is None:
        return ()
    if "bias" not in site.base:
        what = f"lora_B of {show(site.module.name)} has a bias, and the base layer has none"
        raise Refused("adapter-bias", what, where=site.where)
    params: dict[str, Param] = {
        "scales": (scale * site.weight,),
        "numerics": site.numerics,
        "out": site.base["bias"].dtype.value,
    }
    return (Update(kernel_specs.BIAS_MERGE, (bias,), params, "bias", joins=True, scale=scale * site.weight),)


def _kind(site: Site, a: Shape, b: Shape, base: Shape, is_embedding: bool) -> str:
    """`linear`, `conv1d` (stored `[in, out]`), `embedding` or `conv`."""
    rank = a[0]
    if len(a) >= 2 and len(b) >= 2 and b[1] == rank:
        if len(base) > 2:
            ones = (1,) * (len(base) - 2)
            if not is_embedding and len(base) <= 5 and a[1:] == base[1:] and b == (base[0], rank, *ones):
                return "conv"
            if not is_embedding and len(a) == len(base) and b[0] == base[0] and a[1] != base[1]:
                raise Refused("adapter-shape", f"{show(site.target)} is a grouped convolution", where=site.where)
        elif len(a) == len(b) == 2:
            across, along = (b[0], a[1]) == base, (a[1], b[0]) == base
            if is_embedding and along:
                return "embedding"
            if not is_embedding and across and along:
                return "conv1d" if site.is_conv1d else "linear"
            if not is_embedding and (across or along):
                return "linear" if across else "conv1d"
    raise site.misfit(base, f"A {list(a)}, B {list(b)}")


METHOD = Method(
    title="LoRA",
    peft_type="LORA",
    factors=LORA_MATRICES,
    fields=FIELDS,
    update=update,
    layers="Linear, Conv1D, Embedding, convolutions",
    remark="rank-stabilised too; PiSSA and OLoRA starts are rebuilt",
    pairs=(LORA_PAIR, LORA_EMBEDDING_PAIR),
    zeros=(LORA_PAIR[1], LORA_EMBEDDING_PAIR[1]),
)
