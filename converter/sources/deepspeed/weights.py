"""The weights of a DeepSpeed run as lazy tensors, of one that was split by experts or data alone.

Apart from the source itself, which other folders' inspection imports too: reading shards takes the pickle reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.agreement import expect_one_save
from converter.sources.deepspeed.experts import expert_weights, placed_in_order, router_aliases
from converter.sources.deepspeed.layout import frozen_tensors, trained_shapes, trained_tensors
from converter.sources.deepspeed.state import Shards, expect_one_step
from converter.text import fold, show

WRAPPED = "pretrained_model."
"""What TRL's value-head wrapper puts before the names of the model in it."""


@dataclass(frozen=True)
class Weights:
    """A tag's tensors by their names in memory, in the model's order.

    Attributes:
        trained: names that the optimizer held; None where that isn't recorded (stage 0).
        shared: groups of names that are one parameter.
        extra: entries of the model's state that are no tensors.
    """

    tensors: dict[str, LazyTensor]
    trained: frozenset[str] | None
    shared: tuple[tuple[str, ...], ...]
    extra: tuple[str, ...]


def read_weights(shards: Shards, *, master: bool = False) -> Weights:
    """All weights and persistent buffers of a tag.

    Tensors that no file holds (frozen ones, saved with `exclude_frozen_parameters`) stay as the empty placeholders that
    ZeRO-3 writes for them.

    Raises:
        Refused: see `trained_tensors` and `frozen_tensors`.
    """
    module = shards.model().get("module")
    if not isinstance(module, dict) or not all(isinstance(k, str) for k in module):
        raise shards.refuse("zero-malformed", "the model file holds no module", file=shards.model_file())
    held = {n: t for n, t in module.items() if isinstance(t, LazyTensor)}
    held = _named_as_parameters(shards, held) if shards.stage else held
    if shards.experts:
        placed_in_order(shards)
        held |= expert_weights(shards) if shards.stage < 3 else {}
    shared = shared_names(shards) if shards.stage else _same_bytes(held)
    if shards.experts and shards.stage == 3:
        shared |= {a: n for a, n in router_aliases(shards).items() if a in held and n in held}
    has_shapes = shards.stage > 0
    trained = frozenset(n for g in trained_shapes(shards) for n in g) if has_shapes else None
    _expect_same_names(shards, held, trained or frozenset(), shared)
    _expect_buffers(shards, held, trained or frozenset())
    _expect_same_shapes(shards, held)
    computed: dict[str, LazyTensor] = {}
    if shards.stage == 3:
        expect_one_step(shards, [r for r in range(shards.ranks) if r in shards.files.models])
        computed = frozen_tensors(shards)
    unsaved = (trained or frozenset()) - held.keys() if shards.stage in (1, 2) else frozenset()
    if unsaved:
        computed = {n: t for n, t in frozen_tensors(shards).items() if n not in held}
    if shards.stage == 3 or unsaved or (master and (shards.stage or not _all_fp32(held))):
        masters = trained_tensors(shards)
        expect_one_save(shards)
        for name, tensor in masters.items():
            like = held.get(name)
            if shards.stage == 3 or master or name in unsaved:
                computed[name] = tensor if master else tensors.cast(tensor, training_dtype(shards, like))
    names = dict.fromkeys([*held, *computed, *shared])
    found: dict[str, LazyTensor] = {}
    for name in names:
        holder = shared.get(name, name)
        places = (computed.get(name), computed.get(holder), held.get(name), held.get(holder))
        present = [t for t in places if t is not None]
        if not present:
            raise shards.refuse("zero-malformed", f"{show(name)} shares the weight of a name that isn't there")
        found[name] = present[0]
    groups: dict[str, list[str]] = {}
    for alias, holder in shared.items():
        groups.setdefault(holder, [holder]).append(alias)
    extra = tuple(n for n, t in module.items() if not isinstance(t, LazyTensor))
    if trained is not None:
        trained |= {alias for alias, holder in shared.items() if holder in trained}
    return Weights(found, trained, tuple(map(tuple, groups.values())), extra)


def _named_as_parameters(shards: Shards, held: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The module's tensors by their parameters' names.

    TRL's value-head wrapper has a `state_dict` of its own, which leaves `pretrained_model.` out of the names, and under
    PEFT gives the head alone; what DeepSpeed lists of parameters has the names in memory.
    """
    keys = ("param_shapes", "frozen_param_shapes", "shared_params")
    known = {n for key in keys for names in _mappings(shards.model().get(key)) for n in names if isinstance(n, str)}
    if not any(n.startswith(WRAPPED) for n in known):
        return dict(held)
    return {WRAPPED + n if n not in known and WRAPPED + n in known else n: t for n, t in held.items()}


def _expect_same_names(
    shards: Shards, held: Mapping[str, LazyTensor], trained: frozenset[str], shared: Mapping[str, str]
) -> None:
    """Refuse a list of parameters that is another model's: it names what the module lacks, and the module has others.

    A module whose `state_dict` leaves parameters out lacks some, and has none too many.

    Raises:
        Refused: both have names that the other lacks (`zero-malformed`).
    """
    lacks = trained - held.keys()
    if not lacks or shards.experts:
        return
    model = shards.model()
    frozen = {n for names in _mappings(model.get("frozen_param_shapes")) for n in names}
    buffers = model.get("buffer_names")
    known = trained | frozen | shared.keys() | set(shared.values()) | set(buffers if isinstance(buffers, list) else ())
    left = [n for n in held if n not in known]
    if left:
        text = f"param_shapes has {fold(sorted(lacks))}, which the module lacks; it holds {fold(left)}"
        raise shards.refuse("zero-malformed", text, file=shards.model_file())


def _expect_buffers(shards: Shards, held: Mapping[str, LazyTensor], trained: frozenset[str]) -> None:
    """Refuse a module without a buffer that it lists; one whose `state_dict` leaves parameters out may leave any out.

    Raises:
        Refused: a buffer is gone (`zero-malformed`).
    """
    buffers = shards.model().get("buffer_names")
    gone = [n for n in buffers if isinstance(n, str) and n not in held] if isinstance(buffers, list) else []
    if gone and trained and trained <= held.keys() and not shards.experts:
        text = f"buffer_names has {fold(gone)}, which the module lacks"
        raise shards.refuse("zero-malformed", text, file=shards.model_file())


def _expect_same_shapes(shards: Shards, held: Mapping[str, LazyTensor]) -> None:
    """Refuse a list of parameters with other shapes than the module's; placeholders of ZeRO-3 have none.

    Raises:
        Refused: one is not what is listed (`zero-sizes`).
    """
    for group in trained_shapes(shards) if shards.stage else ():
        for name, shape in group.items():
            found = held[name].info.shape if name in held else shape
            if found not in (tuple(shape), (0,)):
                text = f"{show(name)} is {list(shape)} in param_shapes, and {list(found)} in the module"
                raise shards.refuse("zero-sizes", text, file=shards.model_file())


def _mappings(value: object) -> list[Mapping[object, object]]:
    listed = value if isinstance(value, list) else [value]
    return [each for each in listed if isinstance(each, dict)]


def _all_fp32(held: Mapping[str, LazyTensor]) -> bool:
    return all(t.info.dtype is DType.F32 for t in held.values() if t.info.dtype.is_float)


def shared_names(shards: Shards) -> dict[str, str]:
    """Names that share another's parameter, by that other; only rank 0 records them."""
    value = shards.model().get("shared_params")
    if not value:
        return {}
    if not isinstance(value, dict) or not all(isinstance(n, str) for pair in value.items() for n in pair):
        raise shards.refuse("zero-malformed", "shared_params is not a mapping of names", file=shards.model_file())
    return dict(value)


def _same_bytes(held: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The same without ZeRO, where it isn't recorded: names of one view of one storage."""
    first: dict[LazyTensor, str] = {}
    names = {n: first.setdefault(t, n) for n, t in held.items() if t.info.numel}
    return {name: holder for name, holder in names.items() if name != holder}


def training_dtype(shards: Shards, placeholder: LazyTensor | None) -> DType:
    """The dtype of the live parameter: that of its placeholder, else what the DeepSpeed config says."""
    if placeholder is not None:
        return placeholder.info.dtype
    config = shards.model().get("ds_config")
    for key, dtype in (("bf16", DType.BF16), ("bfloat16", DType.BF16), ("fp16", DType.F16)):
        section = config.get(key) if isinstance(config, dict) else None
        if isinstance(section, dict) and section.get("enabled") is True:
            return dtype
    return DType.F32


def described(shards: Shards, stage: int, ranks: int) -> str:
    """`ZeRO-3, 4 ranks`: a run's layout in words."""
    kind = "DeepSpeed without ZeRO" if stage == 0 else f"ZeRO-{stage}"
    if shards.optimizer:
        kind = f"{kind} ({shards.optimizer})"
    if shards.universal:
        kind = f"universal, of {kind}"
    return f"{kind}, {ranks} {'rank' if ranks == 1 else 'ranks'}"
