"""Layers of experts that DeepSpeed's AutoEP put in the place of transformers' own, under transformers' names again.

AutoEP keeps three stacks of a layer's experts (`w1` gate, `w2` down, `w3` up) and a router of its own; transformers has
`gate_up_proj` and `down_proj`. The values are the same ones.

Source: `_repack_fused_3d` of https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/moe/ep_repack.py, and the
modules that `AutoEPMoELayer` has (deepspeed/module_inject/auto_ep_layer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.disk_names import disk_names, taken_apart
from converter.families.expected import Expected, Unknown, expected
from converter.families.implied import class_of
from converter.families.memory_names import Architecture, architecture
from converter.text import fold, show

_STACK = re.compile(r"(.+)\.experts\.w1", re.ASCII)
_WORDS = (
    ("router.gate.", ("gate.", "router.")),
    ("router.", ("gate.", "router.")),
    ("shared_experts.", ("shared_experts.", "shared_expert.")),
    ("shared_experts_gate.", ("shared_expert_gate.", "shared_experts_gate.")),
)
"""What AutoEP's layer calls its modules, and what transformers' do."""


def layers_of(names: Mapping[str, object]) -> list[str]:
    """The layers of AutoEP among tensors of these names."""
    found = [match[1] for n in names if (match := _STACK.fullmatch(n))]
    return [m for m in found if f"{m}.experts.w2" in names and f"{m}.router.gate.weight" in names]


def from_autoep(found: Checkpoint, context: Context) -> Checkpoint:
    """The model with transformers' names in memory; the same where AutoEP took no part.

    Raises:
        Refused: the model's family is not known, or has its experts in another form (`zero-experts`).
    """
    layers = layers_of(found.tensors)
    if not layers:
        return found
    where = show(found.origin.asked)
    wanted = expected(found.config)
    built = architecture(class_of(found.config), found.config)
    if isinstance(wanted, Unknown) or built is None:
        text = f"how transformers has the experts of {show(found.config.get('model_type'))} in memory is not known"
        raise Refused("zero-experts", f"AutoEP replaced them, and {text}", where=where)
    names: dict[str, str] = {}
    stacks: dict[str, LazyTensor] = {}
    dropped: dict[str, str] = {}
    for layer in layers:
        w1, w2, w3 = (found.tensors.get(f"{layer}.experts.w{i}") for i in (1, 2, 3))
        assert w1 is not None
        assert w2 is not None
        if w3 is None or w1.info != w3.info or len(w1.info.shape) != 3:
            raise Refused("zero-experts", f"the experts of {show(layer)} are not three stacks of AutoEP", where=where)
        pairs = [tensors.concat([tensors.narrow(w, 0, e, 1) for w in (w1, w3)], 1) for e in range(w1.info.shape[0])]
        made = {f"{layer}.experts.gate_up_proj": tensors.concat(pairs, 0), f"{layer}.experts.down_proj": w2}
        if wrong := [n for n, t in made.items() if not _is_known(n, t, wanted, built)]:
            text = f"AutoEP's experts would be {fold(wrong)}, which a {wanted.name} of this config doesn't have so"
            raise Refused("zero-experts", text, where=where)
        stacks |= made
        for name, tensor in found.tensors.items():
            if name.startswith(f"{layer}."):
                names[name] = _name(layer, name, tensor, lambda n, t: _is_known(n, t, wanted, built))
        alias, router = f"{layer}.gate.gate.weight", f"{layer}.router.gate.weight"
        if alias in found.tensors:
            copy, own = found.tensors[alias], found.tensors[router]
            if copy is not own and not context.equal(copy, own):
                raise Refused("zero-mixed", f"{show(alias)} and {show(router)} are one tensor, and differ", where=where)
            dropped[alias] = f"the same tensor as {router}"
    context.note("info", "autoep", f"{len(layers)} layers of AutoEP's experts are transformers' again")
    gone = {f"{m}.experts.w{i}" for m in layers for i in (1, 2, 3)} | dropped.keys()
    kept = {n: t for n, t in found.tensors.items() if n not in gone}
    ties = tuple(t for group in found.ties if len(t := tuple(n for n in group if n not in gone)) > 1)
    trained = found.trained
    if trained is not None and trained & gone:
        trained = (trained - gone) | stacks.keys()
    left = (*found.left, *(found.tensors[n] for n in dropped))
    plain = found.replace(tensors=kept, ties=ties, trained=trained).rename(names)
    return plain.replace(tensors={**plain.tensors, **stacks}, dropped={**found.dropped, **dropped}, left=left)


def _is_known(name: str, tensor: LazyTensor, wanted: Expected, built: Architecture) -> bool:
    """True where a name in memory is one or several of the class's on disk, with their shapes."""
    parts = taken_apart(name, tensor, built) or {disk_names([name], built).get(name, name): tensor}
    return all(wanted.saved.get(n) == t.info.shape for n, t in parts.items())


def _name(layer: str, name: str, tensor: LazyTensor, is_known: Callable[[str, LazyTensor], bool]) -> str:
    rest = name.removeprefix(f"{layer}.")
    for own, theirs in _WORDS:
        made = [f"{layer}.{word}{rest.removeprefix(own)}" for word in theirs if rest.startswith(own)]
        if (new := next((n for n in made if is_known(n, tensor)), None)) is not None:
            return new
    return name
