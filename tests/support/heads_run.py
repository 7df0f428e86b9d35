"""What the head tests share: opening by the registered sources, converting, writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import heads_zoo as zoo
from converter.converters.heads.remap import RemapHead
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.writer.plan import make_plan
from converter.core.writer.write import write
from converter.sources.finding import kind_of, sources
from durability import Quiet
from oracle.command import Ran, run

CRITICS = {"skyrl", "trlx", "areal-mcore"}
"""Dialects without a reward model."""


def role_of(dialect: str) -> str:
    return "critic" if dialect in CRITICS else "reward"


def opened(folder: Path) -> Checkpoint:
    """The folder, by whichever source takes it."""
    kind = kind_of(folder)
    assert kind is not None
    return sources()[kind].open(folder, asked=folder.name)


def remapped(source: Checkpoint, to: str, context: Context | None = None, **fields: Any) -> Checkpoint:
    fields.setdefault("role", role_of(to))
    return RemapHead(to=to, **fields)(source, context or Context())


def written(checkpoint: Checkpoint, out: Path) -> Path:
    write(make_plan(checkpoint, context=Context()), out, jobs=1, reporter=Quiet())
    return out


def base_of(model: zoo.Live, folder: Path) -> Path:
    """The causal model that a reward model was trained from."""
    made = zoo.save(zoo.Form("{P}", "none.weight", lm_head=True), model, folder)
    save_file(model.state, made / "model.safetensors", metadata={"format": "pt"})
    return made


def stored(folder: Path, form: zoo.Form) -> zoo.Tensors:
    """Everything that a trainer would read."""
    return {**zoo.read_main(folder, form), **zoo.read_beside(folder, form)}


def same_bits(a: zoo.Tensors, b: zoo.Tensors) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype is b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# The command line


def done(*arguments: object) -> Ran:
    ran = run(*arguments)
    assert ran.code == 0, f"exit {ran.code}\n{ran.out}\n{ran.err}"
    return ran


def refused(code: str, *arguments: object, exit_code: int = 3) -> Ran:
    ran = run(*arguments)
    assert (ran.code, f" {code}" in ran.err) == (exit_code, True), ran.err
    return ran


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
