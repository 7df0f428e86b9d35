"""One part of a verl checkpoint, opened: weights, config, tokenizer, and what is recorded of LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from converter.core.checkpoint import Checkpoint, Origin, SideFile
from converter.core.files.names import LORA_META, MODEL_CONFIG
from converter.core.files.opening import identity
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.families.ties import is_tied
from converter.sources.beside import Beside, find_beside
from converter.sources.places import Place
from converter.sources.survey import file_names, is_weights_of_model, name_of
from converter.sources.verl.files import FSDP_CONFIG, HUGGINGFACE, LORA_ADAPTER, rank_files
from converter.sources.verl.moments import moments, trained_names
from converter.sources.verl.shards import Ranks
from converter.sources.verl.weights import Weights, read_weights
from converter.text import show

KIND = "training"


def open_chosen(
    chosen: Place, root: Path, *, asked: str, revision: str | None, keep_code: bool, master: bool
) -> Checkpoint:
    """The part in `chosen`, which a user meant by `root`.

    Raises:
        Refused: see `read_weights`.
    """
    ranks = Ranks(rank_files(chosen.folder))
    found = read_weights(ranks)
    beside = _beside(chosen.folder, keep_code)
    trained = None
    if any(".lora_" in n for n in found.tensors):
        trained = trained_names(ranks, found, tied=is_tied(beside.config))
    told = [f"{show(chosen.folder.name)}: {chosen.why}"] if chosen.folder != root else []
    if master:
        told += _kept_narrow(found)
    config = _with_dtype(beside.config, found)
    if config != beside.config:
        told.append(f"{MODEL_CONFIG} named another dtype than the weights have; it is corrected")
    return Checkpoint(
        tensors=found.tensors,
        config=config,
        origin=_origin(ranks, asked, revision),
        side_files=beside.files,
        ties=found.shared,
        config_bytes=beside.config_bytes if config == beside.config else None,
        dropped=dict.fromkeys(found.extra, "it is not a tensor, but state of a module's own"),
        inputs=beside.inputs | ranks.inputs,
        checks=tuple(ranks.checks),
        said=(*told, *ranks.files.said, *ranks.said, *beside.said),
        trained=trained,
    )


def moments_of(folder: Path, which: Literal["exp_avg", "exp_avg_sq"]) -> dict[str, LazyTensor]:
    """A part's moments; see `moments`."""
    ranks = Ranks(rank_files(folder))
    return moments(ranks, read_weights(ranks), which, tied=is_tied(_beside(folder, keep_code=False).config))


def _with_dtype(config: Mapping[str, Any], found: Weights) -> dict[str, Any]:
    """The config with the dtype of the weights: where verl saves `hf_model`, it says bf16 of what it keeps in fp32."""
    floats = {t.info.dtype for t in found.tensors.values() if t.info.dtype.is_float}
    if len(floats) != 1:
        return dict(config)
    (dtype,) = floats
    return {
        k: _with_dtype(v, found)
        if isinstance(v, dict) and k.endswith("config")
        else dtype.torch_name
        if k in ("dtype", "torch_dtype") and isinstance(v, str)
        else v
        for k, v in config.items()
    }


def _kept_narrow(found: Weights) -> list[str]:
    narrow = {t.info.dtype for t in found.tensors.values() if t.info.dtype.is_float} - {DType.F32}
    if not narrow:
        return []
    words = " and ".join(sorted(d.torch_name for d in narrow))
    return [f"verl trained weights in {words} and kept no fp32 masters of them: these are their exact values"]


def _beside(folder: Path, keep_code: bool) -> Beside:
    """What lies beside the shards, in verl's folders below them, and in the step's folder."""
    inside = [folder / HUGGINGFACE, folder / LORA_ADAPTER]
    above = [] if folder.name.startswith("global_step_") else [folder.parent]
    found = find_beside([p for p in (folder, *inside, *above) if p.is_dir()], keep_code=keep_code)
    found.said = [s.replace("above the shards, in ", "in ") for s in found.said]
    meta = folder / LORA_META
    if meta.is_file():
        found.files[LORA_META] = SideFile(source=str(meta.absolute()))
        found.inputs[str(meta.absolute())] = identity(meta)
    if (folder / FSDP_CONFIG).is_file():
        found.inputs[str((folder / FSDP_CONFIG).absolute())] = identity(folder / FSDP_CONFIG)
    if is_weights_of_model(file_names(folder / HUGGINGFACE)):
        found.said.append(f"{HUGGINGFACE}/ holds weights too; those of the shards are gathered")
    return found


def _origin(ranks: Ranks, asked: str, revision: str | None) -> Origin:
    real = ranks.folder.resolve()
    count = f"{ranks.files.world} {'rank' if ranks.files.world == 1 else 'ranks'}"
    return Origin(KIND, str(real), asked, name_of(real), revision, ranks.digest, f"verl FSDP, {count}")
