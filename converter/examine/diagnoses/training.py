"""What a run left behind: shards that are whole, folders that are not finished, and what may be deleted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from converter.core.context import Context
from converter.core.files.names import ADAPTER_PICKLED, ADAPTER_WEIGHTS
from converter.core.files.opening import read_limited
from converter.diagnostic import Command, Next, Steps
from converter.errors import ConvertError
from converter.examine.diagnoses import megatron
from converter.examine.diagnoses.case import HERE, LOST, Case, Finding, diagnosis
from converter.sources.finding import RUN_CHECKPOINT
from converter.sources.survey import file_names, is_weights_of_model
from converter.text import fold, show

UNFINISHED = re.compile(r"(?:tmp-checkpoint-\d+|.*\.(?:partial|tmp))", re.ASCII)
TEMPORARY = re.compile(
    r"tmp\w{8}|[\w.-]+\.(?:tmp|temp|partial)|\.[\w.-]+\.(?:safetensors|bin|pt)\.\w{6}",  # the last: rsync's
    re.ASCII,
)
_CUT = frozenset({"file-truncated", "torch-zip", "torch-not", "shard-missing"})
_RECENT = 300.0
"""Seconds: a file that is cut short and this young is likely being written."""

_MOST_LISTED = 4000
_MAX_LATEST = 200


@diagnosis("training-state", "training")
def training_state(case: Case, context: Context) -> Iterable[Finding]:
    """The folder holds a trainer's shards, and they are whole. No loader of models reads them as they are; `gather`
    makes a model or an adapter of them, on a CPU. Until then do not delete them: where no model was saved beside them
    they are the only copy.
    """
    if any(f.severity == "error" for f in case.survey.faults) or not case.shapes:
        return
    if case.once(megatron.CODE, megatron.refusal) is not None:
        return
    count = sum(1 for i in case.shapes.values() if i.numel)
    saved = any(n.kind in ("model", "adapter") and _has_weights(n.path) for n in case.near)
    keep = "" if saved else f". Keep it until then: sole copy of {count} tensors"
    text = f"all ranks' files are here, and no loader of models reads them: `gather` makes a folder that loads{keep}"
    command = case.command("gather", *megatron.base_option(case), out="gathered")
    yield Finding(
        code="training-state",
        severity="cosmetic",
        text=text,
        recoverability=HERE,
        fix=("gather",),
        applicability="safe",
        next=command,
    )


def _has_weights(folder: Path) -> bool:
    names = file_names(folder)
    return is_weights_of_model(names) or ADAPTER_WEIGHTS in names or ADAPTER_PICKLED in names


@diagnosis("sole-copy", "model", "adapter")
def sole_copy(case: Case, context: Context) -> Iterable[Finding]:
    """Tensors are empty or missing here, and a trainer's shards beside may be the only place that holds them. Those
    shards look like a resume state that can be deleted to save disk; keep them until the folder is repaired.
    """
    empty = sum(1 for i in case.shapes.values() if i.shape == (0,))
    lost = any(f.code == "weights-missing" for f in case.survey.faults)
    places = case.training_near()
    if (empty or lost) and places:
        what = "the weights" if not empty else "1 tensor" if empty == 1 else f"{empty} tensors"
        text = f"Keep {show(places[0].asked)}: perhaps the sole copy of {what}"
        yield Finding(code="sole-copy", severity="cosmetic", text=text, evidence=(show(places[0].asked),))


@diagnosis("being-written", "model", "adapter", "training", "weights", "run", "unread")
def being_written(case: Case, context: Context) -> Iterable[Finding]:
    """The folder is not finished: its name or names in it are those of a save that is under way or was cut off
    (tmp-checkpoint-500, *.tmp, *.partial), or a file is cut short and was written minutes ago. Wait and look again; if
    nothing writes there any more, the save failed, and the checkpoint before it is the last sound one.
    """
    name = case.root.resolve().name
    if UNFINISHED.fullmatch(name):
        text = f"{show(name)} is the name of a save that is not finished"
        yield Finding(
            code="being-written",
            severity="error",
            text=text,
            evidence=(show(name),),
            next="wait, or take the checkpoint before it",
        )
        return
    temporary = sorted(n for n in case.names if TEMPORARY.fullmatch(n))
    if temporary:
        text = f"temporary files of a save lie here: {fold(temporary)}"
        yield Finding(
            code="being-written", severity="cosmetic", text=text, evidence=tuple(show(n) for n in temporary[:3])
        )
        return
    cut = [f for f in case.survey.faults if f.code in _CUT and f.fact("instead") is None]
    if cut and (age := _youngest(case.root)) is not None and age < _RECENT:
        sign = f"was written {age:.0f} seconds ago: perhaps the save is under way"
        yield Finding(
            code="being-written",
            severity="cosmetic",
            text=f"a weight file is cut short and {sign}",
            next="wait and look again",
            facts=(("sign", sign),),
        )


def _youngest(root: Path) -> float | None:
    """Seconds since a weight file in the folder was last written to."""
    try:
        with os.scandir(root) as listed:
            times = [
                e.stat(follow_symlinks=False).st_mtime
                for e in islice(listed, _MOST_LISTED)
                if e.name.endswith((".safetensors", ".bin", ".pt", ".distcp"))
            ]
    except OSError:
        return None
    return max(0.0, time.time() - max(times)) if times else None


@diagnosis("shards-deleted", "model", "adapter", "weights", "run")
def shards_deleted(case: Case, context: Context) -> Iterable[Finding]:
    """DeepSpeed's `latest` names a folder that is not there: somebody deleted global_step* to save disk, or a copy left
    it out. Where the weights are whole in other files, only resuming is lost. Where they are not, they are lost with
    it: nothing else held them.
    """
    if "latest" not in case.names:
        return
    try:
        tag = read_limited(case.root / "latest", limit=_MAX_LATEST).decode("utf-8", "replace").strip()
    except (ConvertError, OSError):
        return
    if not tag or "/" in tag or (case.root / tag).exists():
        return
    empty = [n for n, i in case.shapes.items() if i.shape == (0,)]
    is_lost = not case.shapes or bool(empty)
    means = ": what is missing here was in it" if is_lost else "; the weights are whole, resuming is not possible"
    text = f"`latest` names {show(tag)}, which is gone{means}"
    yield Finding(
        code="shards-deleted",
        severity="error" if is_lost else "cosmetic",
        text=text,
        tensors=tuple(empty),
        recoverability=LOST if is_lost else "",
    )


@diagnosis("run-folder", "run")
def run_folder(case: Case, context: Context) -> Iterable[Finding]:
    """The folder of a run, with several checkpoints in it and none of its own: examine the one that is meant. What
    holds weights may be the only copy of them; optimizer states beside a whole model are needed to resume, not to use
    it.
    """
    inside = [n for n in case.near if n.path.is_relative_to(case.root) and n.path != case.root]
    if inside:
        listed = [f"{show(n.asked)} ({n.source})" for n in inside]
        text = f"{len(inside)} checkpoint{'s' * (len(inside) != 1)} below it: {fold(show(n.asked) for n in inside)}"
        of_run = [n for n in inside if RUN_CHECKPOINT.fullmatch(os.path.basename(n.asked))]
        command = Command("doctor", ((of_run or inside)[-1].argument,))
        yield Finding(code="run-folder", severity="cosmetic", text=text, evidence=tuple(listed[-3:]), next=command)


@diagnosis("weights-alone", "weights")
def weights_alone(case: Case, context: Context) -> Iterable[Finding]:
    """A weight file without a config.json: nothing says which model it is of, and no loader takes it. `gather` makes a
    model of it with the config and the tokenizer of the base that `--base` names; for a reward model the architecture
    and one label belong into that config. zero_to_fp32.py writes such files, in float32, and so do scripts that save
    a model beside its optimizer. Without a base `gather --emit state` writes the tensors under their own names.
    """
    if case.shapes:
        names = list(case.survey.files)
        size = sum(case.survey.files.values())
        lora = sum(1 for n in case.shapes if ".lora_" in n)
        more = f", {lora} of them LoRA factors" if lora else ""
        text = f"{fold(names)}: {len(case.shapes)} tensors in {size} bytes{more}, and no config.json beside"
        yield Finding(
            code="weights-alone",
            severity="error",
            text=text,
            evidence=tuple(show(n) for n in names[:3]),
            recoverability="from the base model",
            next=_with_a_config(case, names),
        )  # fmt: skip


def _with_a_config(case: Case, names: list[str]) -> Next:
    """What makes a model of it, with a base that is at hand; else the tensors, which need no config."""
    file = () if len(names) == 1 or case.folder.endswith(names[-1]) else ("--tag", names[-1])
    if case.base is not None:
        return case.command("gather", *file, "--base", case.base.folder, out="gathered")
    state = case.command("gather", *file, "--emit", "state", out="gathered")
    model = "gather makes a model of it with --base and the model that it was trained from; the tensors alone: "
    return Steps(model, state)
