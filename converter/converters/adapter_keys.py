"""Adapter tensors by module: which part of which layer a key is, and which base weight that layer has on disk.

Adapters name modules as they stand in memory; checkpoints name tensors as they stand on disk. Wrappers (DDP, FSDP,
torch.compile), PEFT's own prefixes and adapter names left in keys come on top. A rule that maps one to the other is
accepted only where every key resolves under it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from converter.errors import Refused, fold, show
from converter.tensors import LazyTensor

FACTOR_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_FACTOR = re.compile(rf"^(?P<module>.+?)\.(?P<kind>{'|'.join(FACTOR_KINDS)})(?P<tail>(?:\.[^.]+)*)$")
_TOKENS = re.compile(r"^(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?P<tail>(?:\.[^.]+)*)$")
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PREFIX = "base_model.model."


@dataclass
class Module:
    """Everything an adapter has for one module.

    Attributes:
        name: as in memory, without PEFT's prefix.
        factors: `lora_A` and so on, mapped to the tensor; `lora_B.bias` for the bias of lora_B.
        replaced: `weight`, `bias` ... mapped to a tensor that takes the base's place.
        token_rows: trained rows of an embedding, `[n, dim]`.
        keys: the adapter's own keys, for messages.
    """

    name: str
    factors: dict[str, LazyTensor] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    token_rows: LazyTensor | None = None
    saved: bool = False
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AdapterModules:
    """An adapter's modules, in file order, and what was taken off its keys, in words."""

    modules: Mapping[str, Module]
    stripped: tuple[str, ...]


def read_modules(tensors: Mapping[str, LazyTensor], where: str) -> AdapterModules:
    """Sort an adapter's tensors by module and part.

    Raises:
        Refused: two keys name one part (`adapter-key-twice`).
    """
    stripped: dict[str, None] = {}
    modules: dict[str, Module] = {}
    names = _adapter_names(tensors)
    for key, tensor in tensors.items():
        bare = _bare(key, stripped)
        module, part, saved = _split(bare, names)
        if names:
            stripped[f"adapter name `{show(next(iter(names)))}`"] = None
        entry = modules.setdefault(module, Module(module))
        entry.keys.append(key)
        entry.saved |= saved
        slot: dict[str, LazyTensor] = entry.replaced if part.startswith("=") else entry.factors
        name = part.removeprefix("=")
        if name in slot or (part == "token_rows" and entry.token_rows is not None):
            raise Refused("adapter-key-twice", f"two tensors are the {name} of one module", where=where, got=show(key))
        if part == "token_rows":
            entry.token_rows = tensor
        else:
            slot[name] = tensor
    return AdapterModules(modules, tuple(stripped))


def _bare(key: str, stripped: dict[str, None]) -> str:
    """The key without wrappers and without PEFT's prefix, however often it stands there."""
    pieces = [p for p in key.split(".") if p not in _WRAPPERS]
    if len(pieces) != key.count(".") + 1:
        stripped.update(dict.fromkeys(f"`{p}.`" for p in key.split(".") if p in _WRAPPERS))
    bare = ".".join(pieces)
    while True:
        if bare.startswith("module."):
            stripped["`module.`"] = None
            bare = bare.removeprefix("module.")
        elif bare.startswith(_PREFIX):
            stripped[f"`{_PREFIX}`"] = None
            bare = bare.removeprefix(_PREFIX)
        else:
            return bare


def _adapter_names(tensors: Mapping[str, LazyTensor]) -> frozenset[str]:
    """The adapter name that stands in every key with a LoRA factor, if one does: `lora_A.default.weight`."""
    names: set[str] = set()
    for key in tensors:
        match = _FACTOR.match(key)
        if match is None:
            continue
        tokens = match["tail"].split(".")[1:]
        if tokens and tokens[-1] in ("weight", "bias"):
            tokens.pop()
        if len(tokens) != 1:
            return frozenset()
        names.add(tokens[0])
    return frozenset(names) if len(names) == 1 else frozenset()


def _split(bare: str, names: frozenset[str]) -> tuple[str, str, bool]:
    """Module, part and whether PEFT's modules_to_save wrapper stands in the key. Parts that replace begin with `=`."""
    match = _FACTOR.match(bare)
    if match is not None:
        tail = [t for t in match["tail"].split(".")[1:] if t not in names]
        part = match["kind"]
        if tail == ["bias"]:
            part += ".bias"
        elif tail not in ([], ["weight"]):
            part += "." + ".".join(tail)
        return match["module"], part, False
    match = _TOKENS.match(bare)
    if match is not None:
        return match["module"], "token_rows", False
    pieces = bare.split(".")
    saved = "modules_to_save" in pieces
    if saved:
        at = pieces.index("modules_to_save")
        named = pieces[at + 1 : at + 2]
        drop = 2 if len(pieces) > at + 2 and named[0] in names | {"default"} else 1
        pieces = pieces[:at] + pieces[at + drop :]
    pieces = [p for p in pieces if p != "base_layer"]
    return ".".join(pieces[:-1]), "=" + pieces[-1], saved


AS_IN_BASE = "names as in the base"


@dataclass(frozen=True)
class NameRule:
    """How a module's name in the adapter becomes the name on disk."""

    words: str
    apply: Callable[[str], str]


def _rules(modules: Collection[str], base_modules: Collection[str]) -> Iterator[NameRule]:
    yield NameRule(AS_IN_BASE, lambda name: name)
    for first in dict.fromkeys(name.split(".")[0] for name in modules if "." in name):
        yield NameRule(f"`{first}.` taken off", _strip(first))
    for first in dict.fromkeys(name.split(".")[0] for name in base_modules if "." in name):
        yield NameRule(f"`{first}.` put before", _add(first))
    yield NameRule("`model.language_model.` is `language_model.model.` on disk", _llava)
    yield NameRule("`model.language_model.` is `model.` on disk", _flat)


def _with_old_head(rule: NameRule, base_modules: Collection[str]) -> NameRule:
    """Today's transformers call GPT-NeoX's output embedding `lm_head` in memory, and `embed_out` on disk as ever."""
    if "embed_out" not in base_modules or "lm_head" in base_modules:
        return rule
    return NameRule(rule.words, lambda name: "embed_out" if rule.apply(name) == "lm_head" else rule.apply(name))


def _strip(first: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(first + ".")


def _add(first: str) -> Callable[[str], str]:
    return lambda name: f"{first}.{name}"


def _llava(name: str) -> str:
    if name == "lm_head":
        return "language_model.lm_head"
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.")


def _flat(name: str) -> str:
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.")


def find_rule(
    needed: Mapping[str, Collection[str]], base_names: Collection[str], *, adapter: str, base: str
) -> NameRule:
    """The rule under which every needed tensor is in the base.

    Args:
        needed: tensor leaf names (`weight`, `bias`) by module.
        base_names: tensors of the base, those that exist only as a tie included.

    Raises:
        Refused: no rule resolves all (`adapter-unmatched`), or several do and differ (`adapter-ambiguous`).
    """
    known = set(base_names)
    base_modules = {name.rpartition(".")[0] for name in base_names}
    best: tuple[int, list[str]] = (-1, [])
    accepted: list[NameRule] = []
    for plain in _rules(needed, base_modules):
        rule = _with_old_head(plain, base_modules)
        missing = [
            f"{m}.{leaf}" for m, leaves in needed.items() for leaf in leaves if f"{rule.apply(m)}.{leaf}" not in known
        ]
        if not missing:
            if plain.words == AS_IN_BASE:
                return rule
            accepted.append(rule)
        total = sum(len(leaves) for leaves in needed.values())
        if total - len(missing) > best[0]:
            best = (total - len(missing), missing)
    distinct = {tuple(rule.apply(m) for m in needed): rule for rule in accepted}
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    if distinct:
        words = "; ".join(rule.words for rule in distinct.values())
        raise Refused("adapter-ambiguous", f"the adapter's names fit the base in several ways: {words}", where=adapter)
    matched, missing = best
    if matched == 0:
        what = "none of its modules is in the base: the adapter is for another architecture"
    else:
        what = f"{len(missing)} of its {matched + len(missing)} modules match no weight of the base"
    raise Refused(
        "adapter-unmatched",
        what,
        where=adapter,
        expected=f"every module in {base}, which has {fold(_sample(known))}",
        got=fold(missing),
        next="name the base that it was trained on: --base DIR",
    )


def _sample(names: Collection[str]) -> list[str]:
    layered = sorted(n for n in names if re.search(r"\.\d+\.", n) and n.endswith("weight"))
    return layered or sorted(names)
