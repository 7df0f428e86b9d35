"""A pipeline's checkpoint: a file a layer with its weights, and each stage's optimizer as a run of its own.

Names are those that `PipelineModule` has on one stage: `3.weight` for layer 3, `tied_modules.embed.weight` for a module
that several layers share. The files of layers leave the layer out, and a shared module that is called through a
function of the user's has none: its weights are in the fp32 masters alone, of every stage that has it.

Source: `_build` and `save_state_dict` of
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/pipe/module.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.files import LAYER, slices_in
from converter.sources.deepspeed.layout import trained_shapes, trained_tensors
from converter.sources.deepspeed.slices import Copy
from converter.sources.deepspeed.state import Shards, read_shards
from converter.sources.deepspeed.zero_folder import MASTER, State
from converter.sources.survey import file_names
from converter.text import fold, show

TIED = "tied_modules."
_TIED = re.compile(r"tied_modules\.([^.]+)\.(.+)")
_LAYER = re.compile(r"(\d+)\.(.+)", re.ASCII)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's files.

    Attributes:
        stages: each stage's optimizer and its parameters' names.
        layers: what each layer's file holds, by the layer's number.
    """

    stages: tuple[Shards, ...]
    layers: Mapping[int, Mapping[str, LazyTensor]]

    @property
    def first(self) -> Shards:
        """The first stage, which keeps what is read of all."""
        return self.stages[0]


def read_pipeline(first: Shards) -> Pipeline:
    """The files of a pipeline, of which the first stage's are read.

    Raises:
        Refused: files are missing, mixed, or of tensors that were split too (`zero-pipeline`).
    """
    folder = first.folder
    layers: dict[int, str] = {}
    for name in sorted(file_names(folder)):
        match = LAYER.fullmatch(name)
        if match is None:
            continue
        number = int(match[1])
        if number in layers or match[2] not in (None, "0", "00"):
            text = f"layer {number} was split over ranks within its tensors too, or two runs saved into this folder"
            raise first.refuse("zero-pipeline", text, file=name, next=_OTHER_TOOL)
        layers[number] = name
    slices = slices_in(folder)
    claimed = first.model().get("mp_world_size")
    count = claimed if type(claimed) is int and 0 < claimed <= 10_000 else max(slices) + 1
    if slices != list(range(count)):
        lost = fold([f"mp_rank_{n:02d}" for n in range(count) if n not in slices])
        text = f"the run had {count} stages, and the files of some are missing ({lost}) or of other runs"
        raise first.refuse("zero-pipeline", text, next="copy them from the nodes that wrote them")
    stages = (first, *(read_shards(folder, n, like=first) for n in range(1, count)))
    _expect_one_run(stages)
    held = {n: _tensors(first, file) for n, file in sorted(layers.items())}
    return Pipeline(stages, held)


_OTHER_TOOL = "convert it with Megatron-DeepSpeed's tools/convert_checkpoint/deepspeed_to_transformers.py"


def _expect_one_run(stages: tuple[Shards, ...]) -> None:
    keys = ("global_steps", "dp_world_size", "mp_world_size")
    said = {tuple(repr(s.model().get(k)) for k in keys) for s in stages}
    if len(said) > 1 or len({(s.stage, s.ranks) for s in stages}) > 1:
        raise stages[0].refuse("zero-mixed", "the files of the pipeline's stages are of different steps or runs")


def _tensors(shards: Shards, file: str) -> dict[str, LazyTensor]:
    return {str(k): t for k, t in shards.open(file).items() if isinstance(t, LazyTensor)}


def pipeline_weights(found: Pipeline) -> tuple[dict[str, LazyTensor], list[Copy]]:
    """Weights by name in the training dtype, and further copies of some, which must be equal.

    Raises:
        Refused: a layer's file is missing or is not of these stages (`zero-pipeline`).
    """
    first = found.first
    known = {n: s for stage in found.stages for n, s in _shapes(stage).items()}
    if lost := sorted(numbered_layers(known) - found.layers.keys()):
        raise first.refuse(
            "zero-pipeline",
            f"the files of layers {fold([str(n) for n in lost])} are missing",
            next="copy them from the nodes that wrote them",
        )
    tied = _tied_layers(found, {n: s for n, s in known.items() if s is not None})
    weights: dict[str, LazyTensor] = {}
    copies: list[Copy] = []
    for number, own in found.layers.items():
        before = f"{TIED}{tied[number]}." if number in tied else f"{number}."
        for key, tensor in own.items():
            name = f"{before}{key}"
            if (known.get(name) or tensor.info.shape) != tensor.info.shape:
                text = f"{show(key)} is {list(tensor.info.shape)} in layer {number}, and not so in param_shapes"
                raise first.refuse("zero-sizes", text)
            if name in weights:
                copies.append((name, weights[name], tensor))
            else:
                weights[name] = tensor
    if lost_names := [n for n, shape in known.items() if shape is None and n not in weights]:
        text = f"no file of a layer holds {fold(lost_names)}, and without ZeRO its shape is not recorded"
        raise first.refuse("zero-pipeline", text, next="look for a checkpoint that was saved with ZeRO stage 1")
    return weights, copies


def numbered_layers(names: Iterable[str]) -> set[int]:
    """Numbers of the layers that parameters of these names are in."""
    return {int(match[1]) for name in names if (match := _LAYER.fullmatch(name))}


def lists_shapes(stage: Shards) -> bool:
    """True where the parameters' shapes are recorded: BF16_Optimizer's run without ZeRO leaves them out."""
    return bool(stage.stage) and stage.model().get("param_shapes") is not None


def _shapes(stage: Shards) -> dict[str, tuple[int, ...] | None]:
    """The parameters of a stage with their shapes; None where only the names are recorded."""
    if not stage.stage:
        return {}
    if lists_shapes(stage):
        return {n: s for g in trained_shapes(stage) for n, s in g.items()}
    names: dict[str, tuple[int, ...] | None] = {}
    for rank in stage.files.optimizers:
        listed = stage.optim(rank).get("param_slice_mappings")
        for group in listed if isinstance(listed, list) else []:
            names |= {n: None for n in group if isinstance(n, str)} if isinstance(group, dict) else {}
    return names


def _tied_layers(found: Pipeline, known: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """The shared module that a layer's file is of, by the layer's number.

    A file without names of its own among the parameters is of a shared module, and of the one that has its tensors.
    """
    shared: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in known.items():
        if match := _TIED.fullmatch(name):
            shared.setdefault(match[1], {})[match[2]] = shape
    numbered = numbered_layers(known)
    tied: dict[int, str] = {}
    for number, own in found.layers.items():
        if number in numbered or not shared:
            continue
        fitting = [k for k, names in shared.items() if all(own[n].info.shape == s if n in own else False
                                                           for n, s in names.items())]  # fmt: skip
        if len(fitting) > 1:
            text = f"layer {number} may be of any of the shared modules {fold(fitting)}: nothing says of which"
            raise found.first.refuse("zero-pipeline", text)
        if fitting:
            tied[number] = fitting[0]
    return tied


def pipeline_states(found: Pipeline, state: State = MASTER) -> tuple[dict[str, LazyTensor], list[Copy]]:
    """Masters, or a state of the optimizer, by name, and other stages' copies of shared modules'.

    Raises:
        Refused: see `trained_tensors`.
    """
    states: dict[str, LazyTensor] = {}
    copies: list[Copy] = []
    for stage in found.stages:
        for name, tensor in trained_tensors(stage, state).items():
            if name not in states:
                states[name] = tensor
            else:
                copies.append((name, states[name], tensor))
    return states, copies


def expect_all_held(found: Pipeline, weights: Mapping[str, LazyTensor]) -> None:
    """Without ZeRO nothing lists the parameters: the optimizer's moments must all be of tensors in the layers' files.

    Raises:
        Refused: a shared module that is called through a function has no file (`zero-pipeline`).
    """
    for stage in found.stages:
        outer = stage.model().get("optimizer")
        state = outer.get("state") if isinstance(outer, dict) else None
        if not isinstance(state, dict):
            text = "without ZeRO, in 16 bits, nothing lists the parameters: shared modules without a file can't be seen"
            raise stage.refuse("zero-pipeline", text, file=stage.model_file(), next="save with ZeRO stage 1")
        moments = [m.info.shape for s in state.values() if isinstance(s, dict)
                   for m in (s.get("exp_avg"),) if isinstance(m, LazyTensor)]  # fmt: skip
        shapes = [t.info.shape for t in weights.values()]
        for shape in set(moments):
            if moments.count(shape) > shapes.count(shape):
                text = (
                    f"a trained parameter {list(shape)} is in no file: a module that layers share and call through a "
                    "function is not saved without ZeRO"
                )
                raise stage.refuse("zero-pipeline", text, next="look for a checkpoint that was saved with ZeRO stage 1")
