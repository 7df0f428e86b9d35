"""DeepSpeed checkpoints: ZeRO stages 0 to 3 and BF16_Optimizer, gathered without DeepSpeed, torch or a GPU.

A tag's folder becomes a checkpoint whose tensors are stretches of the ranks' files. In the training dtype by default:
stages 0 to 2 store such weights whole, and byte for byte they are copied; in stage 3 they are the fp32 masters, rounded
once, which is how DeepSpeed makes the live ones. Names are those in memory; the converter `gather` makes a model or an
adapter of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter import tensors
from converter.checkpoint import Checkpoint, Origin, SideFile
from converter.dtypes import DType
from converter.errors import Refused, UsageError, show
from converter.files import Identity, identity, read_limited
from converter.side_files import find_side_files, is_tokenizer_file
from converter.sources.deepspeed_files import find_tag, holds_shards, run_folders, search_tag, tags_in
from converter.sources.deepspeed_layout import State, frozen_tensors, trained_shapes, trained_tensors
from converter.sources.deepspeed_state import Shards, expect_one_step, read_shards
from converter.sources.hf import parse_config
from converter.sources.places import Place
from converter.sources.survey import ADAPTER_CONFIG, MODEL_CONFIG, Fault, StoredTensor, Survey, file_names, folder_kind
from converter.strict_json import MAX_JSON_BYTES
from converter.tensor_bytes import leaves
from converter.tensors import LazyTensor

KIND = "training"


class DeepSpeedSource:
    """What DeepSpeed's `save_checkpoint` wrote."""

    name = "deepspeed"
    precedence = 10

    def detect(self, root: Path) -> str | None:
        """Why a folder is DeepSpeed's, or None."""
        names = file_names(root)
        if holds_shards(names):
            return "shards of DeepSpeed are there"
        if folder_kind(names) is not None:
            return None
        tags = tags_in(root)
        if tags:
            return f"shards of DeepSpeed are in {show(tags[-1].name)}"
        return None

    def find(self, root: Path, asked: str, *, tag: str | None = None, part: str | None = None) -> Place | None:
        """The tag's folder at or below `root`; see `search_tag`."""
        return search_tag(root, asked, tag)

    def survey(self, root: Path) -> Survey:
        """Files, tensors and faults; content never raises."""
        survey = Survey(root)
        try:
            tag = find_tag(root, show(root))
            shards = read_shards(tag.folder)
            found = read_weights(shards)
        except (Refused, UsageError) as error:
            fault = Fault(error.code, "error", error.what, error.where or show(root), error.next)
            survey.faults.append(fault)
            return survey
        listed = [shards.files.whole, *shards.files.models.values(), *shards.files.optimizers.values()]
        survey.files = {n: (tag.folder / n).stat().st_size for n in listed if n is not None}
        for name, tensor in found.tensors.items():
            first = next(leaves(tensor), None)
            survey.entries[name] = StoredTensor(tensor, str(tag.folder) if first is None else first.file)
        survey.faults += [Fault("zero-note", "cosmetic", text, show(root)) for text in shards.said]
        return survey

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The checkpoint in the training dtype.

        Raises:
            UsageError: several tags to choose from (`several-checkpoints`).
            Refused: files missing, mixed or malformed, each named; a layout that is not read.
        """
        return open_tag(root, asked=asked, revision=revision, keep_code=keep_code)

    def open_masters(
        self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False
    ) -> Checkpoint:
        """The same with trained parameters as fp32 masters."""
        return open_tag(root, asked=asked, revision=revision, keep_code=keep_code, master=True)


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
    shared = _shared(shards)
    has_shapes = shards.stage > 0
    trained = frozenset(n for g in trained_shapes(shards) for n in g) if has_shapes else None
    computed: dict[str, LazyTensor] = {}
    if shards.stage == 3:
        expect_one_step(shards, [r for r in range(shards.ranks) if r in shards.files.models])
        computed = frozen_tensors(shards)
    if shards.stage == 3 or (master and (shards.stage or not _all_fp32(held))):
        for name, tensor in trained_tensors(shards).items():
            like = held.get(name)
            if shards.stage < 3 and (like is None or like.info.shape != tensor.info.shape):
                text = f"{show(name)} is {list(tensor.info.shape)} in param_shapes, and not so in the module"
                raise shards.refuse("zero-sizes", text, file=shards.model_file())
            computed[name] = tensor if master else tensors.cast(tensor, _training_dtype(shards, like))
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


def _all_fp32(held: Mapping[str, LazyTensor]) -> bool:
    return all(t.info.dtype is DType.F32 for t in held.values() if t.info.dtype.is_float)


def _shared(shards: Shards) -> dict[str, str]:
    """Names that share another's parameter, by that other; only rank 0 records them."""
    value = shards.model().get("shared_params")
    if not value:
        return {}
    if not isinstance(value, dict) or not all(isinstance(n, str) for pair in value.items() for n in pair):
        raise shards.refuse("zero-malformed", "shared_params is no mapping of names", file=shards.model_file())
    return dict(value)


def _training_dtype(shards: Shards, placeholder: LazyTensor | None) -> DType:
    """The dtype of the live parameter: that of its placeholder, else what the DeepSpeed config says."""
    if placeholder is not None:
        return placeholder.info.dtype
    config = shards.model().get("ds_config")
    for key, dtype in (("bf16", DType.BF16), ("bfloat16", DType.BF16), ("fp16", DType.F16)):
        section = config.get(key) if isinstance(config, dict) else None
        if isinstance(section, dict) and section.get("enabled") is True:
            return dtype
    return DType.F32


def open_tag(
    root: Path,
    *,
    asked: str,
    revision: str | None = None,
    keep_code: bool = False,
    tag: str | None = None,
    master: bool = False,
) -> Checkpoint:
    """A tag as a checkpoint; see `DeepSpeedSource`.

    Args:
        tag: the folder's name; None: what `latest` says, or the only one.
        master: trained parameters as fp32 masters.
    """
    chosen = find_tag(root, asked, tag)
    shards = read_shards(chosen.folder)
    found = read_weights(shards, master=master)
    files, inputs, config, config_bytes, said = _beside(chosen.folder, keep_code)
    told = [f"{show(chosen.folder.name)}: {chosen.why}"] if chosen.folder != root else []
    return Checkpoint(
        tensors=found.tensors,
        config=config,
        origin=_origin(shards, chosen.folder, asked, revision),
        side_files=files,
        ties=found.shared,
        config_bytes=config_bytes,
        dropped=dict.fromkeys(found.extra, "it is no tensor, but state of a module's own"),
        inputs=inputs | shards.inputs,
        checks=tuple(shards.checks),
        said=(*told, *shards.said, *said),
        trained=found.trained,
    )


def adam_moments(
    root: Path, *, which: Literal["exp_avg", "exp_avg_sq"], tag: str | None = None
) -> dict[str, LazyTensor]:
    """Adam's first or second moment of every trained parameter, by its name in memory.

    Raises:
        UsageError: no such tag.
        Refused: stage 0, another optimizer, or files missing, mixed or malformed.
    """
    state: State = which
    return trained_tensors(read_shards(find_tag(root, show(root), tag).folder), state)


def _origin(shards: Shards, folder: Path, asked: str, revision: str | None) -> Origin:
    real = folder.resolve()
    kind = "DeepSpeed without ZeRO" if shards.stage == 0 else f"ZeRO-{shards.stage}"
    if shards.optimizer:
        kind = f"{kind} ({shards.optimizer})"
    count = f"{shards.ranks} {'rank' if shards.ranks == 1 else 'ranks'}"
    return Origin(KIND, str(real), asked, real.name, revision, shards.digest, f"{kind}, {count}")


def _beside(
    tag_folder: Path, keep_code: bool
) -> tuple[dict[str, SideFile], dict[str, Identity], dict[str, Any], bytes | None, list[str]]:
    """Config, adapter config, tokenizer and other files that lie beside or above the shards, the nearest of each."""
    files: dict[str, SideFile] = {}
    inputs: dict[str, Identity] = {}
    said: list[str] = []
    config: dict[str, Any] = {}
    raw: bytes | None = None
    for folder in run_folders(tag_folder):
        where = "beside the shards" if folder == tag_folder else f"above the shards, in {show(folder.name)}"
        names = file_names(folder)
        if MODEL_CONFIG in names and raw is None:
            raw = read_limited(folder / MODEL_CONFIG, limit=MAX_JSON_BYTES, root=folder)
            config = parse_config(raw, folder / MODEL_CONFIG)
            inputs[str((folder / MODEL_CONFIG).absolute())] = identity(folder / MODEL_CONFIG)
            said.append(f"{MODEL_CONFIG} found {where}")
        if ADAPTER_CONFIG in names and ADAPTER_CONFIG not in files:
            path = str((folder / ADAPTER_CONFIG).absolute())
            files[ADAPTER_CONFIG] = SideFile(source=path)
            inputs[path] = identity(folder / ADAPTER_CONFIG)
            said.append(f"{ADAPTER_CONFIG} found {where}")
        own, identities = find_side_files(folder, keep_code=keep_code)
        has_tokenizer = any(is_tokenizer_file(n) for n in files)
        new = {n: f for n, f in own.items() if n not in files and not (has_tokenizer and is_tokenizer_file(n))}
        if any(is_tokenizer_file(n) for n in new):
            said.append(f"tokenizer found {where}")
        files |= new
        inputs |= {f.source: identities[f.source] for f in new.values() if f.source in identities}
    return files, inputs, config, raw, said


SOURCE = DeepSpeedSource()
