"""Quantised folders with one part harmed: doctor under --deep and verify name it, and nothing is made whole of it."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

import quantised
from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from oracle.bases import read_tensors, write_tensors

Tensors = dict[str, torch.Tensor]
KINDS = ("removed", "renamed", "halved", "zeroed", "cast", "copied", "nan", "huge", "rewritten")
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_scale_inv",
          "absmax", "quant_map", "SCB", "nested_absmax", "proj.weight", "__nf4", "weight_global_scale")  # fmt: skip
_LAYOUTS = ("g_idx", "weight_shape", "nested_quant_map", "__nf4")
"""Parts that say how others are read."""
_LEAST_COPIED, _LEAST_DISTINCT = 256, 16
"""Bytes, and different ones: copies of less are not told from chance."""


def harmed(tensors: Tensors, kind: str, draw: random.Random) -> tuple[Tensors, str] | None:
    """The tensors with one harm, and the name of the part; None where it has no place."""
    made = dict(tensors)
    names = sorted(n for n in tensors if n.endswith(_LAYOUTS if kind == "rewritten" else _PARTS))
    if not names:
        return None
    name = draw.choice(names)
    value = tensors[name]
    is_wide_float = value.is_floating_point() and value.dtype.itemsize > 1
    if kind == "removed":
        del made[name]
    elif kind == "renamed":
        made[f"my.{name}"] = made.pop(name)
    elif kind == "halved" and value.dim() and max(value.shape) > 1:
        dim = draw.choice([d for d, size in enumerate(value.shape) if size > 1])
        made[name] = value.narrow(dim, 0, value.shape[dim] // 2).clone()
    elif kind == "zeroed" and value.dim() and value.view(torch.uint8).any():
        made[name] = torch.zeros_like(value)
    elif kind == "cast" and (is_wide_float or value.dtype == torch.int32):
        narrow = torch.float16 if value.dtype == torch.float32 else torch.float32
        made[name] = value.to(narrow if is_wide_float else torch.int64)
    elif kind == "copied" and value.nbytes >= _LEAST_COPIED and not name.endswith(("qzeros", "g_idx", "_map")):
        others = [n for n, t in tensors.items() if n.rpartition(".")[2] == name.rpartition(".")[2] and n != name]
        others = [n for n in others if tensors[n].shape == value.shape and n.endswith(_PARTS)]
        if not others or len(set(value.view(torch.uint8).flatten().tolist())) < _LEAST_DISTINCT:
            return None
        made[name] = tensors[draw.choice(sorted(others))].clone()
    elif kind in ("nan", "huge") and is_wide_float and value.dim():
        made[name] = value.clone()
        huge = 6e4 if value.dtype == torch.float16 else 1e30
        made[name].view(-1)[draw.randrange(value.numel())] = float("nan") if kind == "nan" else huge
    elif kind == "rewritten" and (changed := _rewritten(name, value, draw)) is not None:
        made[name] = changed
    else:
        return None
    return made, name


def _rewritten(name: str, value: torch.Tensor, draw: random.Random) -> torch.Tensor | None:
    """What says how a weight is read, saying otherwise."""
    if name.endswith("weight_shape"):
        return value.flip(0) if value[0] != value[1] else value * 2
    if name.endswith("__nf4"):
        state = json.loads(bytes(value.tolist()))
        state |= draw.choice(({"blocksize": 128}, {"quant_type": "fp4"}, {"shape": [s * 2 for s in state["shape"]]}))
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    if name.endswith("nested_quant_map"):
        return value.flip(0)
    return torch.full_like(value, int(value.max())) if name.endswith("g_idx") else None


@dataclass(frozen=True)
class Outcome:
    """One case; `wrong` is empty where nothing is."""

    case: str
    kind: str
    place: str
    wrong: str = ""


@dataclass
class Sound:
    """A sound folder of each format, made once."""

    root: Path
    held: dict[str, Path] = field(default_factory=dict)

    def folder(self, form: str) -> Path:
        """Where it lies."""
        if form not in self.held:
            (self.root / form).mkdir(parents=True)
            self.held[form] = quantised.make(self.root / form, form).path
        return self.held[form]


def case(sound: Sound, form: str, seed: int, kind: str | None = None) -> Outcome | None:
    """One harm to one folder; None where it has no place."""
    source, draw = sound.folder(form), random.Random(f"{form} {seed}")
    kind = kind or draw.choice(KINDS)
    found = harmed(read_tensors(source), kind, draw)
    if found is None:
        return None
    with tempfile.TemporaryDirectory(dir=sound.root) as scratch:
        folder = Path(shutil.copytree(source, Path(scratch) / "harmed"))
        write_tensors(folder, found[0])
        findings = examine(DoctorRequest(str(folder), deep=True)).findings
        wrong = [] if any(f.severity != "cosmetic" for f in findings) else ["doctor is silent"]
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            wrong += ["verified"] if main(["verify", str(folder)]) == 0 else []
            if kind not in ("nan", "huge", "zeroed", "copied"):  # numbers are as they are
                asked = ["--to", "transformers", "--role", "actor", "--dequantize", "--dry-run", "-q"]
                wrong += ["made whole"] if main(["convert", str(folder), f"{scratch}/out", *asked]) == 0 else []
        return Outcome(form, kind, found[1], ", ".join(wrong))
