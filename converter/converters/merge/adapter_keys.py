"""Adapter tensors by module: which part of which layer a key is.

Wrappers (DDP, FSDP, torch.compile), PEFT's own prefixes and adapter names left in keys come on top of the module's name
in memory; `name_rules` finds the name on disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.factors import alternatives, shared_names
from converter.families.words import IN_PEFT, INNER_WRAPPERS, PEFT_PREFIX, SAVED_WHOLE
from converter.text import show

_TOKENS = re.compile(r"^(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?P<tail>(?:\.[^.]+)*)$")
_MODEL = "base_model."

SAVED, PLAIN, UNDER = "saved", "plain", "under"
"""Where a whole tensor stands: in PEFT's modules_to_save wrapper, at the module's own name, or frozen below a wrapper
(`original_module`, `base_layer`), as PEFT saves it with resized embeddings."""

_FROZEN = frozenset((*(word for word in IN_PEFT if word != SAVED_WHOLE), "token_adapter"))


@dataclass
class Module:
    """Everything an adapter has for one module.

    Attributes:
        name: as in memory, without PEFT's prefix.
        factors: `lora_A` and so on, mapped to the tensor; `lora_B.bias` for the bias of lora_B.
        whole: `weight`, `bias` ... mapped to the tensors that the adapter holds of it, by where they stand, each with
            its key.
        token_rows: trained rows of an embedding, `[n, dim]`; `rows_key` is their key.
        keys: the adapter's own keys, for messages.
    """

    name: str
    factors: dict[str, LazyTensor] = field(default_factory=dict)
    whole: dict[str, dict[str, tuple[str, LazyTensor]]] = field(default_factory=dict)
    token_rows: LazyTensor | None = None
    rows_key: str = ""
    keys: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> dict[str, LazyTensor]:
        """`weight`, `bias` ... mapped to a tensor that takes the base's place: the trained one where there are more."""
        return {leaf: self._first(leaf)[1] for leaf in self.whole}

    def key(self, leaf: str) -> str:
        """The adapter's key of what takes the base's place."""
        return self._first(leaf)[0]

    def _first(self, leaf: str) -> tuple[str, LazyTensor]:
        held = self.whole[leaf]
        return next(held[place] for place in (SAVED, PLAIN, UNDER) if place in held)

    def copy(self, leaf: str) -> tuple[str, LazyTensor] | None:
        """The tensor under its plain name beside the saved one: the same a second time, with its key."""
        held = self.whole[leaf]
        return held.get(PLAIN) if SAVED in held else None

    def under(self, leaf: str) -> tuple[str, LazyTensor] | None:
        """The frozen tensor that lies below the trained one, with its key."""
        held = self.whole[leaf]
        return held.get(UNDER) if len(held) > 1 else None

    @property
    def saved(self) -> bool:
        """True where PEFT's modules_to_save wrapper stands in a key."""
        return any(SAVED in held for held in self.whole.values())


@dataclass(frozen=True)
class AdapterModules:
    """An adapter's modules, in file order.

    Attributes:
        stripped: what was taken off its keys, in words.
        shared: tensors that a method keeps once for the whole model, by their bare name.
    """

    modules: Mapping[str, Module]
    stripped: tuple[str, ...]
    shared: Mapping[str, LazyTensor] = field(default_factory=dict)


@cache
def _factor() -> re.Pattern[str]:
    return re.compile(rf"^(?P<module>.+?)\.(?P<kind>{alternatives()})(?P<tail>(?:\.[^.]+)*)$")


def read_modules(tensors: Mapping[str, LazyTensor], where: str) -> AdapterModules:
    """Sort an adapter's tensors by module and part.

    Raises:
        Refused: two keys name one part (`adapter-key-twice`).
    """
    stripped: dict[str, None] = {}
    modules: dict[str, Module] = {}
    shared: dict[str, LazyTensor] = {}
    names = _adapter_names(tensors)
    for key, tensor in tensors.items():
        bare = _bare(key, stripped)
        whole = _shared(bare, names)
        if whole in shared:
            raise Refused("adapter-key-twice", f"two tensors are the {whole} of the model", where=where, got=show(key))
        if whole:
            shared[whole] = tensor
            continue
        module, part, place = _split(bare, names)
        if names:
            stripped[f"adapter name `{show(next(iter(names)))}`"] = None
        entry = modules.setdefault(module, Module(module))
        entry.keys.append(key)
        held = entry.whole.setdefault(part, {}) if place else {}
        if place in held or part in entry.factors or (part == "token_rows" and entry.token_rows is not None):
            raise Refused("adapter-key-twice", f"two tensors are the {part} of one module", where=where, got=show(key))
        if place:
            held[place] = (key, tensor)
        elif part == "token_rows":
            entry.token_rows, entry.rows_key = tensor, key
        else:
            entry.factors[part] = tensor
    return AdapterModules(modules, tuple(stripped), shared)


def _shared(bare: str, names: frozenset[str]) -> str:
    """The name of a tensor that belongs to the model as a whole; empty where the key is not of one."""
    pieces = [p for p in bare.removeprefix(_MODEL).split(".") if p not in names]
    name = ".".join(pieces)
    return name if name in shared_names() else ""


def _bare(key: str, stripped: dict[str, None]) -> str:
    """The key without wrappers and without PEFT's prefix, however often it stands there."""
    bare = key
    if any(wrapper in key for wrapper in INNER_WRAPPERS):
        pieces = key.split(".")
        stripped.update(dict.fromkeys(f"`{p}.`" for p in pieces if p in INNER_WRAPPERS))
        bare = ".".join(p for p in pieces if p not in INNER_WRAPPERS)
    while True:
        if bare.startswith("module."):
            stripped["`module.`"] = None
            bare = bare.removeprefix("module.")
        elif bare.startswith(PEFT_PREFIX):
            stripped[f"`{PEFT_PREFIX}`"] = None
            bare = bare.removeprefix(PEFT_PREFIX)
        else:
            return bare


def _adapter_names(tensors: Mapping[str, LazyTensor]) -> frozenset[str]:
    """The adapter name that stands in every key with a LoRA factor, if one does: `lora_A.default.weight`."""
    names: set[str] = set()
    for key in tensors:
        match = _factor().match(key)
        if match is None:
            continue
        tokens = match["tail"].split(".")[1:]
        if tokens and tokens[-1] in ("weight", "bias"):
            tokens.pop()
        if len(tokens) != 1:
            return frozenset()
        names.add(tokens[0])
    return frozenset(names) if len(names) == 1 else frozenset()


def _split(bare: str, names: frozenset[str]) -> tuple[str, str, str]:
    """Module, part, and for a whole tensor where it stands; nothing for factors and token rows."""
    match = _factor().match(bare)
    if match is not None:
        tail = [t for t in match["tail"].split(".")[1:] if t not in names]
        part = match["kind"]
        if tail == ["bias"]:
            part += ".bias"
        elif tail not in ([], ["weight"]):
            part += "." + ".".join(tail)
        return match["module"], part, ""
    match = _TOKENS.match(bare)
    if match is not None:
        return match["module"], "token_rows", ""
    pieces = bare.split(".")
    place = PLAIN
    if "modules_to_save" in pieces:
        at = pieces.index("modules_to_save")
        named = pieces[at + 1 : at + 2]
        drop = 2 if len(pieces) > at + 2 and named[0] in names | {"default"} else 1
        pieces = pieces[:at] + pieces[at + drop :]
        place = SAVED
    elif not _FROZEN.isdisjoint(pieces[:-1]):
        place = UNDER
    pieces = [*(p for p in pieces[:-1] if p not in _FROZEN), pieces[-1]]
    return ".".join(pieces[:-1]), pieces[-1], place
