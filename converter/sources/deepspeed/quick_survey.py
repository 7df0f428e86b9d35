"""A quick look at a ZeRO-3 tag: rank 0's files are read, of the others only the zip directory and the sizes.

Every rank's optimizer file has the same partitions, ceil(numel / ranks) elements of each parameter, so one of them
says what all hold. Where a rank's sizes are not rank 0's, the whole is read instead, which names the fault.
"""

from __future__ import annotations

from pathlib import Path

from converter.core.formats.torch_container import record_sizes
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.errors import Refused
from converter.sources.deepspeed.layout import trained_shapes
from converter.sources.deepspeed.state import Shards, shapes
from converter.sources.deepspeed.weights import shared_names, training_dtype
from converter.sources.own_names import saved_as_another
from converter.sources.survey import StoredTensor, Survey
from converter.text import show

FEW_RANKS = 4
"""So many ranks are read whole: it takes no longer than a screen."""


def survey_of_first(shards: Shards, root: Path) -> Survey | None:
    """Files and tensors by the first rank alone; None where the others have to be read to tell.

    The tensors have shapes and dtypes and no place in a file.
    """
    if shards.stage != 3 or shards.universal or shards.ranks <= FEW_RANKS or 0 not in shards.files.optimizers:
        return None
    if any(r not in shards.files.models for r in range(shards.ranks)):
        return None
    folder, both = shards.folder, (shards.files.models, shards.files.optimizers)
    try:
        found = {n: record_sizes(folder / n, root=folder) for files in both for n in files.values()}
    except Refused:
        return None
    sizes = [found[n][1] for n in shards.files.optimizers.values()]
    # The largest records are the partitions; small ones hold steps and differ in nothing that counts.
    if len({tuple(s) for s in sizes}) > 1 or any(not found[n][1] for n in shards.files.models.values()):
        return None
    if any(saved_as_another(n, name) for n, (name, _) in found.items()):
        return None
    survey = Survey(root)
    listed = [*shards.files.models.values(), *shards.files.optimizers.values()]
    survey.files = {n: (folder / n).stat().st_size for n in listed}
    for name, info in _infos(shards).items():
        survey.entries[name] = StoredTensor(Filled(info, 0), str(folder))
    return survey


def _infos(shards: Shards) -> dict[str, TensorInfo]:
    """Dtype and shape of every tensor, in the model's order."""
    module = shards.model().get("module")
    if not isinstance(module, dict) or not all(isinstance(k, str) for k in module):
        raise shards.refuse("zero-malformed", "the model file holds no module", file=shards.model_file())
    held = {n: t for n, t in module.items() if isinstance(t, LazyTensor)}
    found = {n: t.info for n, t in held.items()}
    for name, shape in _frozen(shards).items():
        fragments = shards.model().get("frozen_param_fragments")
        fragment = fragments.get(name) if isinstance(fragments, dict) else None
        like = fragment if isinstance(fragment, LazyTensor) else held.get(name)
        if like is None:
            text = f"the frozen parameter {show(name)} has no fragment"
            raise shards.refuse("zero-sizes", text, file=shards.model_file())
        found[name] = TensorInfo(like.info.dtype, shape)
    for group in trained_shapes(shards):
        for name, shape in group.items():
            found[name] = TensorInfo(training_dtype(shards, held.get(name)), shape)
    shared = shared_names(shards)
    missing = [n for n in shared if n not in found and shared[n] not in found]
    if missing:
        raise shards.refuse("zero-malformed", f"{show(missing[0])} shares the weight of a name that isn't there")
    return found | {alias: found.get(holder, found.get(alias, TensorInfo(training_dtype(shards, None), (0,))))
                    for alias, holder in shared.items()}  # fmt: skip


def _frozen(shards: Shards) -> dict[str, tuple[int, ...]]:
    value = shards.model().get("frozen_param_shapes")
    return shapes(shards, value, shards.model_file()) if value else {}
