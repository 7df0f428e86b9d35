"""Layouts that are recognised and not read, each refused with the tool that can."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from converter.core.checkpoint import Checkpoint
from converter.core.files.opening import open_input, pread
from converter.errors import Refused, UsageError
from converter.sources.survey import Fault, SourceKind, Survey, file_names
from converter.sources.verl.files import is_megatron, megatron_refusal
from converter.text import fold, show

_OTHER_FILES = (
    (
        re.compile(r"layer_\d+-model_\d+-model_states\.pt", re.ASCII),
        "zero-pipeline",
        "a pipeline-parallel checkpoint (one file a layer)",
        "Megatron-DeepSpeed's tools/convert_checkpoint/deepspeed_to_transformers.py",
    ),
    (
        re.compile(
            r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_.*optim_states\.pt", re.ASCII
        ),
        "zero-experts",
        "a checkpoint with DeepSpeed's own mixture-of-experts layers",
        "the training script itself: load it with DeepSpeed and save with gathered parameters",
    ),
)
_MEGATRON_STEP = re.compile(r"iter_\d+", re.ASCII)
_MEGATRON_FOLDER = re.compile(r"mp_rank_\d+(?:_\d+)*", re.ASCII)


class Unread:
    """The source that is asked last: it refuses by name what others can't read."""

    name = "unread"
    kind: SourceKind = "unread"
    precedence = -10

    def detect(self, root: Path) -> str | None:
        """What the folder is, or None."""
        refusal = other_layout(root)
        return None if refusal is None else refusal.what

    def survey(self, root: Path) -> Survey:
        """The refusal as a fault."""
        survey = Survey(root)
        if (refusal := other_layout(root)) is not None:
            survey.faults.append(Fault.of(refusal))
        return survey

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """Refuses.

        Raises:
            Refused: always, with the tool that can read it.
        """
        raise other_layout(root) or UsageError("not-a-checkpoint", "nothing here is recognised", where=show(asked))


def other_layout(root: Path) -> Refused | None:
    """The refusal for a layout that this source recognises and does not read."""
    if is_megatron(root):
        return megatron_refusal(root)
    names = file_names(root)
    for pattern, code, what, tool in _OTHER_FILES:
        found = sorted(n for n in names if pattern.fullmatch(n))
        if found:
            text = f"this is {what}, which is not read: {fold([show(n) for n in found])}"
            return Refused(code, text, where=show(root), next=f"convert it with {tool}")
    if is_megatron_sharded(root, names):
        return megatron(root, "sharded by Megatron-core, its layers stacked and its matrices fused")
    try:
        below = [p for p in root.iterdir() if p.is_dir()]
    except OSError:
        return None
    if any(p.name == "offloaded_tensors" for p in below):
        text = "the optimizer was offloaded to NVMe: its state is in offloaded_tensors, and not whole in the shards"
        advice = "load it with DeepSpeed where the NVMe files are, and save it gathered (engine.save_16bit_model)"
        return Refused("zero-offloaded", text, where=show(root), next=advice)
    ranks = [p for p in below if _MEGATRON_FOLDER.fullmatch(p.name) and _is_megatron(file_names(p))]
    if ranks:
        return megatron(root, fold(sorted(p.name for p in ranks)))
    steps = [p for p in below if _MEGATRON_STEP.fullmatch(p.name)]
    if any(is_megatron_sharded(p, file_names(p)) for p in steps):
        return megatron(root, fold(sorted(p.name for p in steps)))
    return None


def megatron(root: Path, why: str) -> Refused:
    """The refusal of what Megatron saved."""
    advice = "convert it with Megatron-Bridge (AutoBridge.export_ckpt) or Megatron-LM's tools/checkpoint/convert.py"
    text = f"this is a Megatron checkpoint, which is not read: {why}"
    return Refused("megatron", text, where=show(root), next=advice)


def is_megatron_sharded(root: Path, names: Collection[str]) -> bool:
    """True for Megatron-core's sharded checkpoints: torch's distributed files, whose tensors are stacked and fused."""
    if "common.pt" in names and ".metadata" in names:
        return True
    if "metadata.json" not in names:
        return False
    try:
        fd = open_input(root / "metadata.json", root=root)
    except Refused:
        return False
    try:
        return b'"sharded_backend"' in pread(fd, 4096, 0)
    finally:
        os.close(fd)


def _is_megatron(names: Collection[str]) -> bool:
    return any(n in names for n in ("model_optim_rng.pt", "model_rng.pt", "distrib_optim.pt"))


SOURCE = Unread()
