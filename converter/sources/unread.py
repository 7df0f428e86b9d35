"""Layouts that are recognised and not read, each refused with the tool that can."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from converter.checkpoint import Checkpoint
from converter.errors import Refused, UsageError, fold, show
from converter.sources.survey import Fault, Survey, file_names

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
    (
        re.compile(r"\.metadata|.*\.distcp", re.ASCII),
        "torch-dcp",
        "a torch distributed checkpoint",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch",
    ),
)
_MEGATRON_FOLDER = re.compile(r"mp_rank_\d+(?:_\d+)*", re.ASCII)


class Unread:
    """The source that is asked last: it refuses by name what others can't read."""

    name = "unread"
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
    names = file_names(root)
    for pattern, code, what, tool in _OTHER_FILES:
        found = sorted(n for n in names if pattern.fullmatch(n))
        if found:
            text = f"this is {what}, which is not read: {fold([show(n) for n in found])}"
            return Refused(code, text, where=show(root), next=f"convert it with {tool}")
    try:
        below = [p for p in root.iterdir() if p.is_dir()]
    except OSError:
        return None
    if any(p.name == "zero" and any((q / "fp32.pt").is_file() for q in _some(p)) for p in below):
        text = "this is a universal DeepSpeed checkpoint, which is not read"
        advice = "gather the folder that it was made from (global_step*), or load it with DeepSpeed and save"
        return Refused("zero-universal", text, where=show(root), next=advice)
    if any(p.name == "offloaded_tensors" for p in below):
        text = "the optimizer was offloaded to NVMe: its state is in offloaded_tensors, and not whole in the shards"
        advice = "load it with DeepSpeed where the NVMe files are, and save it gathered (engine.save_16bit_model)"
        return Refused("zero-offloaded", text, where=show(root), next=advice)
    ranks = [p for p in below if _MEGATRON_FOLDER.fullmatch(p.name) and _is_megatron(file_names(p))]
    if ranks:
        text = f"this is a Megatron checkpoint, which is not read: {fold(sorted(p.name for p in ranks))}"
        advice = "convert it with Megatron-Bridge (AutoBridge.export_ckpt) or Megatron-LM's tools/checkpoint/convert.py"
        return Refused("megatron", text, where=show(root), next=advice)
    return None


def _some(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())[:16]
    except OSError:
        return []


def _is_megatron(names: Collection[str]) -> bool:
    return any(n in names for n in ("model_optim_rng.pt", "model_rng.pt", "distrib_optim.pt"))


SOURCE = Unread()
