"""What differs between a tuned model and its base, and where an adapter keeps each of it.

Names are those that transformers has in memory, as an adapter carries them. A matrix of a linear layer gets factors; a
bias has a place of its own; what is neither is kept whole, with its module, as PEFT's `modules_to_save` are. For what
belongs to no such module an adapter has no place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.memory_names import Architecture, MemoryNames, architectures
from converter.families.stacks import one_of
from converter.families.words import CLASSIFIERS, INPUT_MODULES, OLD_BUFFERS, OTHER_INPUT_MODULES, OUTPUT_MODULES
from converter.text import fold, show

Kind = Literal["factors", "bias", "whole"]
FACTORS: Final = "factors"
BIAS: Final = "bias"
WHOLE: Final = "whole"

_LEAVES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_EMBEDDINGS = frozenset((*INPUT_MODULES, *OTHER_INPUT_MODULES, "wpe", "relative_attention_bias"))
_ROUTERS = frozenset({"gate", "router", "wg"})


@dataclass(frozen=True)
class Tensor:
    """A tensor of the tuned model.

    Attributes:
        module: its name in memory without the last component, which is `leaf`.
        base: the base's; None where it has none.
        changed: it is not the base's, bit by bit.
    """

    module: str
    leaf: str
    tuned: LazyTensor
    base: LazyTensor | None
    changed: bool


@dataclass
class Changes:
    """A tuned model, tensor by tensor.

    Attributes:
        modules: the tuned model's tensors by module and leaf.
        equal: names on disk of what is the base's, bit by bit.
        places: what each changed module is kept as.
        experts: changed experts that a load stacks, by names on disk.
        tokens: of the tuned model's embeddings, where the base's have fewer; else 0.
    """

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    equal: list[str] = field(default_factory=list)
    places: dict[str, Kind] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def of(self, kind: Kind) -> list[str]:
        """The modules that are kept so, in file order."""
        return [name for name, found in self.places.items() if found == kind]


def find_changes(tuned: Checkpoint, base: Checkpoint, context: Context) -> Changes:
    """Compare two models and say where an adapter keeps what differs.

    Raises:
        Refused: they are not of one shape (`models-differ`), they are equal (`no-op`), or an adapter has no place for
            what differs (`adapter-no-place`).
    """
    built = next(iter(architectures(tuned.config, {})), None)
    names = _memory_names(tuned, built)
    found = Changes()
    missing: list[str] = []
    for disk, (memory, is_made) in names.items():
        below = _below(disk, memory, base, built)
        if below is not None and below.info.shape != tuned.tensors[disk].info.shape:
            if not _has_more_tokens(memory, tuned.tensors[disk], below):
                raise _of_other_shape(disk, below, tuned, base)
            below, found.tokens = None, tuned.tensors[disk].info.shape[0]
        same = below is not None and context.equal(tuned.tensors[disk], below)
        if same:
            found.equal.append(disk)
        if is_made and not same:
            if below is None or one_of(disk, built) is None:
                missing.append(disk)
            else:
                module, _, leaf = disk.rpartition(".")
                found.experts[disk] = Tensor(module, leaf, tuned.tensors[disk], below, True)
        elif not is_made:
            module, _, leaf = memory.rpartition(".")
            found.modules.setdefault(module, {})[leaf] = Tensor(module, leaf, tuned.tensors[disk], below, not same)
    if missing:
        what = f"{len(missing)} tensors changed that a load splits or permutes: {fold(missing)}"
        raise Refused(
            "adapter-no-place-experts",
            f"{what}; a LoRA adapter of modules can't hold them",
            where=show(tuned.origin.asked),
            next="keep the tuned model, or average it with its base instead",
        )
    if not found.experts and not any(t.changed for held in found.modules.values() for t in held.values()):
        what = "the tuned model is its base, bit by bit: there is no update to extract"
        raise Refused("no-op", what, where=show(tuned.origin.asked))
    _find_places(found, tuned, built, context)
    return found


def _memory_names(tuned: Checkpoint, built: Architecture | None) -> dict[str, tuple[str, bool]]:
    """Names in memory by names on disk, and whether a load makes the tensor of others."""
    met: set[int] = set()
    found: dict[str, tuple[str, bool]] = {}
    prefix = "" if built is None else f"{built.prefix}."
    inside = prefix != "." and any(n.startswith(prefix) for n in tuned.tensors)
    for disk in sorted(tuned.tensors):
        if disk.endswith(OLD_BUFFERS):
            continue
        memory, transform = (disk, None) if built is None else built.in_memory(disk, met)
        is_head = memory.split(".")[0] in (*CLASSIFIERS, *OUTPUT_MODULES)
        if prefix.strip(".") and not inside and not is_head and not _is_bare(built):
            memory = memory if memory.startswith(prefix) else prefix + memory
        found[disk] = (memory, transform is not None)
    return {disk: found[disk] for disk in tuned.tensors if disk in found}


def _is_bare(built: Architecture | None) -> bool:
    return built is not None and built.name.endswith("Model")


def _below(disk: str, memory: str, base: Checkpoint, built: Architecture | None) -> LazyTensor | None:
    """The base's tensor: of that name, of that name in memory, or the one that it is tied to."""
    if disk in base.tensors:
        return base.tensors[disk]
    names = None if built is None else MemoryNames.of(built, base.tensors, ())
    other = None if names is None else names.find(memory)
    tied = (other, *base.tied_to(disk), *base.tied_to(memory))
    return next((base.tensors[n] for n in tied if n is not None and n in base.tensors), None)


def _has_more_tokens(memory: str, tuned: LazyTensor, below: LazyTensor) -> bool:
    """True for an embedding, in or out, whose vocabulary grew: it is kept whole."""
    ours, theirs = tuned.info.shape, below.info.shape
    is_vocabulary = memory.rpartition(".")[0].rpartition(".")[2] in (*INPUT_MODULES, *OUTPUT_MODULES)
    return is_vocabulary and ours[1:] == theirs[1:] and ours[0] > theirs[0]


def _of_other_shape(name: str, below: LazyTensor, tuned: Checkpoint, base: Checkpoint) -> Refused:
    ours, theirs = list(tuned.tensors[name].info.shape), list(below.info.shape)
    is_vocabulary = name.rpartition(".")[0].rpartition(".")[2] in (*_EMBEDDINGS, *OUTPUT_MODULES)
    step = "cut the base's rows first: repair --allow vocabulary-trim, or resize_token_embeddings and save_pretrained"
    return Refused(
        "models-differ",
        f"{show(name)} is {ours} in {show(tuned.origin.asked)} and {theirs} in {show(base.origin.asked)}; an adapter "
        "changes values and no shapes",
        where=show(tuned.origin.asked),
        next=step if is_vocabulary else "name the base that training began with",
    )


def _find_places(found: Changes, tuned: Checkpoint, built: Architecture | None, context: Context) -> None:
    homeless: list[str] = []
    for module, held in found.modules.items():
        changed = [t for t in held.values() if t.changed]
        is_head = module.rpartition(".")[2] in CLASSIFIERS or module.split(".")[0] in CLASSIFIERS
        if not changed and not is_head:
            continue
        if not module or not held.keys() <= _LEAVES or "weight" not in held:
            homeless += [f"{module}.{t.leaf}" if module else t.leaf for t in changed]
        elif _has_factors(module, held, is_head):
            found.places[module] = FACTORS if held["weight"].changed else BIAS
        else:
            found.places[module] = WHOLE
    for module in list(_tied_partners(found, tuned, built)):
        found.places[module] = WHOLE
    if homeless:
        context.consent(
            Refused(
                "adapter-no-place",
                f"{len(homeless)} parameters changed that a LoRA adapter has no place for, as they are neither the "
                f"weight nor the bias of a module: {fold(homeless)}; the adapter would leave them as the base's",
                where=show(tuned.origin.asked),
            )
        )


def _has_factors(module: str, held: Mapping[str, Tensor], is_head: bool) -> bool:
    """True for a linear layer: a matrix that is no embedding, no head and no router."""
    weight = held["weight"]
    last = module.rpartition(".")[2]
    words = {*module.split(".")}
    is_embedding = last in _EMBEDDINGS or "embed" in last or "position" in last
    is_plain = not is_head and not is_embedding and last not in (*_ROUTERS, *OUTPUT_MODULES)
    is_matrix = len(weight.tuned.info.shape) == 2 and weight.base is not None and not words & {"embeddings"}
    return is_plain and is_matrix


def _tied_partners(found: Changes, tuned: Checkpoint, built: Architecture | None) -> Iterator[str]:
    """Modules that a tie makes the same as a changed embedding: PEFT keeps a copy of each that is saved whole."""
    for group in tuned.ties:
        memory = [n if built is None else built.in_memory(n)[0] for n in group if n.endswith(".weight")]
        modules = [n.removesuffix(".weight") for n in memory]
        held = [m for m in modules if found.places.get(m) == WHOLE]
        if held and any(found.modules[m]["weight"].changed for m in held):
            for module in modules:
                if module not in found.modules:
                    found.modules[module] = {"weight": found.modules[held[0]]["weight"]}
                    yield module
