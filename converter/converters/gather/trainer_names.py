"""Models under the names of torchtitan and torchtune, under transformers' again, with their rows in its order.

Both keep Meta's way to rotate positions for the families that have it there: pairs of neighbouring rows of q and k,
where transformers pairs a head's halves. Which families those are is each trainer's own table; a family that is in none
is refused, since names alone do not tell.

Source: https://github.com/pytorch/torchtitan/blob/v0.3.0/torchtitan/models/llama3/state_dict_adapter.py, those of
qwen3, deepseek_v3 and gpt_oss, https://github.com/pytorch/torchtune/blob/v0.6.1/torchtune/models/convert_weights.py,
that of qwen2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.byte_runs import stored_parts
from converter.core.tensors.kernel_specs import PERMUTE
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.text import fold, show

EMBEDDING = "tok_embeddings.weight"
Rows = Literal["q", "k"] | None
_LAYER = re.compile(r"layers\.(\d+)\.(.+)", re.ASCII)
_NOT_SAVED = re.compile(r"freqs_cis|rope\.(?:freqs|cache)|layers\.\d+\.attn\.pos_embeddings\.(?:cache|theta)", re.ASCII)
"""Tables of positions, which every load computes."""

_TITAN: Mapping[str, str] = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.qkv_linear.wq": "self_attn.q_proj", "attention.qkv_linear.wk": "self_attn.k_proj",
    "attention.qkv_linear.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa", "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj", "attention.wq_a": "self_attn.q_a_proj",
    "attention.wq_b": "self_attn.q_b_proj",
    "moe.router.gate": "mlp.gate", "moe.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "moe.shared_experts.w3": "mlp.shared_experts.up_proj", "moe.shared_experts.w2": "mlp.shared_experts.down_proj",
}  # fmt: skip
_TITAN_OF_FAMILY: Mapping[str, Mapping[str, str]] = {
    "deepseek_v3": {
        "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
        "moe.expert_bias_E": "mlp.gate.e_score_correction_bias",
    },
    "gpt_oss": {
        "attention.sinks": "self_attn.sinks",
        "moe.router.gate.weight": "mlp.router.weight", "moe.router.gate.bias": "mlp.router.bias",
    },
}  # fmt: skip
_STACKS = {"w1_EFD": "gate_proj", "w3_EFD": "up_proj", "w2_EDF": "down_proj"}
"""torchtitan's experts of a layer, one matrix each along the first dimension."""
_WHOLE_STACKS = {
    "mlp1_weight": "gate_up_proj", "mlp1_bias": "gate_up_proj_bias",
    "mlp2_weight": "down_proj", "mlp2_bias": "down_proj_bias",
}  # fmt: skip
"""Those of gpt-oss, which transformers has in one tensor too, `[e, in, out]` where torchtitan has `[e, out, in]`; since
0.3.0 their names end in the letters of their dimensions, which torchtitan's own export of 0.3.0 does not know."""
_STACK = re.compile(r"moe\.routed_experts\.inner_experts\.(\w+)", re.ASCII)
_BIAS = re.compile(r"layers\.\d+\.moe\.expert_bias_E", re.ASCII)
_TUNE: Mapping[str, str] = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
    "mlp.w1": "mlp.gate_proj", "mlp.w3": "mlp.up_proj", "mlp.w2": "mlp.down_proj",
    "sa_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
}  # fmt: skip
_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "lm_head": "lm_head"}


@dataclass(frozen=True)
class Trainer:
    """A trainer's names.

    Attributes:
        layers: transformers' modules of a layer by the trainer's.
        paired: model types whose q and k have pairs of neighbouring rows.
        plain: model types whose rows are transformers'.
        of_family: names of a layer's tensors that one model type alone has so.
    """

    name: str
    layers: Mapping[str, str]
    paired: frozenset[str]
    plain: frozenset[str]
    of_family: Mapping[str, Mapping[str, str]]


_TITAN_PLAIN = frozenset({"qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss"})
TITAN = Trainer("torchtitan", _TITAN, frozenset({"llama"}), _TITAN_PLAIN, _TITAN_OF_FAMILY)
TUNE = Trainer("torchtune", _TUNE, frozenset({"llama", "mistral", "gemma"}), frozenset({"qwen2"}), {})


def trainer_of(names: Mapping[str, object]) -> Trainer | None:
    """Whose names these are; None where they are neither's."""
    if EMBEDDING not in names:
        return None
    return TUNE if any(".attn.q_proj." in n or n.endswith("sa_norm.scale") for n in names) else TITAN


def from_trainer_names(found: Checkpoint, context: Context) -> Checkpoint:
    """The model under transformers' names; the same where it has them.

    Raises:
        Refused: the trainer's layout of this family is not known, a tensor is none of the family's, or config.json is
            of another model (`names-of-trainer`).
    """
    trainer = trainer_of(found.tensors)
    if trainer is None:
        return found
    family = str(found.config.get("model_type"))
    if family not in trainer.paired | trainer.plain:
        known = ", ".join(sorted(trainer.paired | trainer.plain))
        text = f"tensors have {trainer.name}'s names, and how it has the rows of {show(family)} is not known"
        raise _refuse(found, text, expected=known)
    heads = _Heads.of(found) if family in trainer.paired else None
    made: dict[str, LazyTensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    unknown: list[str] = []
    dropped = {n: "a table of positions, which a load computes" for n in found.tensors if _NOT_SAVED.fullmatch(n)}
    if zeros := _biases_of_zero(found, family, context):
        dropped |= dict.fromkeys(zeros, "a bias of routers that is zero: it chooses no other experts")
        text = (
            f"the bias of {len(zeros)} routers, for which transformers' {show(family)} has no place, is zero: left out"
        )
        context.note("info", "trainer-names", text)
    for raw, tensor in found.tensors.items():
        if raw in dropped:
            continue
        own = _renamed(raw, tensor, trainer, family)
        if not own or own.keys() & made.keys():
            unknown.append(raw)
        for name, value in own.items():
            made[name] = value if heads is None else heads.placed(name, value)
        names[raw] = tuple(own)
    if unknown:
        text = f"{len(unknown)} tensors are none that {trainer.name} has in a {show(family)}: {fold(unknown)}"
        raise _refuse(found, text)
    rows = "with pairs of rows of q and k in its order" if heads is not None else "with its rows as they were"
    context.note("info", "trainer-names", f"{trainer.name}'s names are transformers' again, {rows}")
    trained = None if found.trained is None else frozenset(m for n in found.trained for m in names.get(n, (n,)))
    ties = tuple(tuple(m for n in group for m in names.get(n, (n,))) for group in found.ties)
    left = (*found.left, *(found.tensors[n] for n in dropped))
    return found.replace(
        tensors=made, shards={}, trained=trained, ties=ties, dropped={**found.dropped, **dropped}, left=left
    )


def _refuse(found: Checkpoint, what: str, expected: str | None = None) -> Refused:
    asked = found.origin.asked
    state = Again(("--emit", "state"), otherwise=Command("gather", (asked, "OUT", "--emit", "state")))
    return Refused(
        "names-of-trainer",
        what,
        where=show(asked),
        expected=expected,
        next=Steps("convert it with the trainer's own script, or write the state dict: ", state),
    )


def _biases_of_zero(found: Checkpoint, family: str, context: Context) -> list[str]:
    """Biases of routers that change nothing, of a family that has none.

    torchtitan balances the experts' load with them, saves them by default, and leaves them out of what it exports.

    Raises:
        Refused: one chooses experts (`names-of-trainer`).
    """
    if "moe.expert_bias_E" in _TITAN_OF_FAMILY.get(family, {}):
        return []
    biases = [n for n in found.tensors if _BIAS.fullmatch(n)]
    chosen = [n for n in biases if not all(map(context.is_zero, stored_parts(found.tensors[n])))]
    if chosen:
        text = (
            f"the routers have a bias that chooses experts ({fold(chosen)}), and transformers' {show(family)} has none"
        )
        raise _refuse(found, f"{text}: the model would choose others")
    return biases


def _renamed(raw: str, tensor: LazyTensor, trainer: Trainer, family: str) -> dict[str, LazyTensor]:
    """What a tensor is to transformers, by name, experts apart; nothing where it is unknown."""
    layer = _LAYER.fullmatch(raw)
    if layer is None:
        module, _, leaf = raw.rpartition(".")
        end = _ENDS.get(module)
        return {f"{end}.weight": tensor} if end is not None and leaf in ("weight", "scale") else {}
    before = f"model.layers.{layer[1]}."
    if (own := trainer.of_family.get(family, {}).get(layer[2])) is not None:
        return {f"{before}{own}": tensor}
    if trainer is TITAN and (stack := _STACK.fullmatch(layer[2])) is not None:
        if family == "gpt_oss":
            return _whole_stack(f"{before}mlp.experts.", stack[1], tensor)
        return _experts(f"{before}mlp.experts.", _STACKS.get(stack[1]), tensor)
    module, _, leaf = layer[2].rpartition(".")
    known = trainer.layers.get(module)
    if known is None or leaf not in ("weight", "bias", "scale"):
        return {}
    return {f"{before}{known}.{'weight' if leaf == 'scale' else leaf}": tensor}


def _experts(before: str, module: str | None, stack: LazyTensor) -> dict[str, LazyTensor]:
    """The matrices of a layer's experts, one by one, as transformers saves them."""
    if module is None or len(stack.info.shape) != 3:
        return {}
    count, *shape = stack.info.shape
    each = (tensors.reshape(tensors.narrow(stack, 0, n, 1), tuple(shape)) for n in range(count))
    return {f"{before}{n}.{module}.weight": t for n, t in enumerate(each)}


def _whole_stack(before: str, name: str, stack: LazyTensor) -> dict[str, LazyTensor]:
    """The matrices of a layer's experts in one tensor, each turned; or their biases, which are the same."""
    known = _WHOLE_STACKS.get(re.sub(r"_E[A-Z]+$", "", name))
    if known is None or len(stack.info.shape) != (2 if known.endswith("bias") else 3):
        return {}
    is_bias = known.endswith("bias")
    return {f"{before}{known}": stack if is_bias else tensors.apply(PERMUTE, [stack], {"dims": (0, 2, 1)})}


@dataclass(frozen=True)
class _Heads:
    """How many heads q and k have, and the rows of one."""

    query: int
    key: int
    rows: int
    found: Checkpoint

    @classmethod
    def of(cls, found: Checkpoint) -> _Heads:
        config = found.config
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if type(heads) is not int or type(hidden) is not int or heads < 1 or hidden < heads:
            raise _refuse(found, "config.json has no num_attention_heads or hidden_size")
        key: Any = config.get("num_key_value_heads")
        rows: Any = config.get("head_dim")
        return cls(heads, key if type(key) is int else heads, rows if type(rows) is int else hidden // heads, found)

    def placed(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """A tensor with the rows of q and k as transformers has them; others as they are."""
        count = {"q_proj": self.query, "k_proj": self.key}.get(name.split(".")[-2])
        if count is None:
            return tensor
        if tensor.info.shape[0] != count * self.rows or self.rows % 2 or not self.rows:
            text = f"{show(name)} has {tensor.info.shape[0]} rows, and config.json says {count} heads of {self.rows}"
            raise _refuse(self.found, text)
        return halves_from_pairs(tensor, count)


def halves_from_pairs(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Each head's rows `0, 2, 4, ...` and then `1, 3, 5, ...`, as they are where pairs of rows are rotated."""
    width = tensor.info.numel // tensor.info.shape[0]
    pairs = tensors.reshape(tensor, (tensor.info.shape[0] // 2, 2 * width))
    half = tensor.info.shape[0] // heads // 2
    parts = []
    for head in range(heads):
        own = tensors.narrow(pairs, 0, head * half, half)
        parts += [tensors.reshape(tensors.narrow(own, 1, at * width, width), (half, width)) for at in (0, 1)]
    return tensors.reshape(tensors.concat(parts, 0), tensor.info.shape)
