"""What `reshard --world-size` does with a step of verl: all of its parts, for another number of ranks."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from converter.core.checkpoint import SideFile
from converter.core.files.names import MODEL_CONFIG
from converter.core.files.opening import Identity, identity, read_limited
from converter.core.files.strict_json import MAX_JSON_BYTES, load_json
from converter.core.formats.torch_file import read_torch_file
from converter.core.formats.weight_file import PICKLED_SUFFIXES
from converter.core.writer.accounting import checks_of
from converter.core.writer.plan import Plan
from converter.families.ties import is_tied
from converter.sources.hf.source import parse_config
from converter.sources.resharded import Resharded
from converter.sources.survey import file_names, is_weight_file
from converter.sources.verl.files import FSDP_CONFIG, HUGGINGFACE, LORA_ADAPTER, TRACKER, find_step
from converter.sources.verl.resharding import Part, reshard_part
from converter.text import fold, show

_OF_RANK = re.compile(r"(?:model|optim|extra_state)_world_size_\d{1,6}_rank_\d{1,6}\.pt", re.ASCII)
_BESIDE = ("data.pt", "lora_train_meta.json")
"""What else a trainer reads when it goes on: the place in its data, which belongs to no rank, and LoRA's settings."""


def plan_verl(root: Path, asked: str, ranks: int, *, tag: str | None) -> Resharded:
    """The plan for a run, a step or a part of it.

    Raises:
        UsageError: several steps to choose from, or none.
        Refused: see `reshard_part`.
    """
    chosen, parts = find_step(root, asked, tag=tag)
    step = chosen.folder
    is_step = re.fullmatch(r"global_step_(\d+)", step.name, re.ASCII)
    top = step.name if is_step else ""
    made: dict[str, Part] = {}
    files: dict[str, SideFile] = {}
    inputs: dict[str, Identity] = {}
    said = [f"{show(step.name)}: {chosen.why}"] if step != root else []
    for folder in parts:
        place = "/".join(p for p in (top, folder.name if folder != step else "") if p)
        made[folder.name] = reshard_part(folder, place, ranks, tied=_is_tied(folder))
        said += [f"{folder.name}: {text}" if len(parts) > 1 else text for text in made[folder.name].said]
        said += _carry(folder, place, ranks, files, inputs)
    if is_step:
        files[TRACKER] = SideFile(content=is_step[1].encode())
        if parts != [step]:
            said += _carry(step, top, ranks, files, inputs)
    shards = tuple(s for part in made.values() for s in part.shards)
    for part in made.values():
        files |= part.files
        inputs |= part.inputs
    checks = checks_of((e.tensor for s in shards for e in s.entries), [c for p in made.values() for c in p.checks])
    before = max(part.world for part in made.values())
    return Resharded(
        Plan(shards, files, inputs, {}, {}, checks=checks),
        step.name,
        None,
        before,
        ranks,
        _described(made, before),
        _described(made, ranks),
        None,
        tuple(said),
        "trainer.default_local_dir={out} trainer.resume_mode=auto" if is_step else 'manager.load_checkpoint("{out}")',
        hashlib.sha256(repr(sorted((n, p.digest) for n, p in made.items())).encode()).hexdigest(),
    )


def _described(made: dict[str, Part], ranks: int) -> str:
    words = " and ".join(made) if len(made) > 1 else "verl FSDP"
    return f"{words}, {ranks} {'rank' if ranks == 1 else 'ranks'}"


def _is_tied(folder: Path) -> bool:
    path = folder / HUGGINGFACE / MODEL_CONFIG
    return path.is_file() and is_tied(parse_config(read_limited(path, limit=MAX_JSON_BYTES, root=folder), path))


def _carry(folder: Path, place: str, ranks: int, files: dict[str, SideFile], inputs: dict[str, Identity]) -> list[str]:
    """Files beside the ranks' that whoever goes on reads; what is left there, in words."""
    left: list[str] = []
    start = f"{place}/" if place else ""
    for name in sorted(file_names(folder)):
        path = folder / name
        if _OF_RANK.fullmatch(name):
            continue
        if name == FSDP_CONFIG:
            content = {**load_json(path), "world_size": ranks}
            files[start + name] = SideFile(content=json.dumps(content, indent=4).encode())
        elif name in _BESIDE:
            if name.endswith(PICKLED_SUFFIXES):
                read_torch_file(path, root=folder)  # what loads it unpickles it: refused where it names foreign code
            files[start + name] = SideFile(source=str(path.absolute()))
        else:
            left.append(name)
            continue
        inputs[str(path.absolute())] = identity(path)
    for inner in (HUGGINGFACE, LORA_ADAPTER):
        for name in sorted(file_names(folder / inner)) if (folder / inner).is_dir() else ():
            path = folder / inner / name
            if is_weight_file(name) and inner == HUGGINGFACE:
                left.append(f"{inner}/{name}")
                continue
            files[f"{start}{inner}/{name}"] = SideFile(source=str(path.absolute()))
            inputs[str(path.absolute())] = identity(path)
    return [f"not carried along: {fold(left)}"] if left else []
