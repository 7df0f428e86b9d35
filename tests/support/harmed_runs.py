"""Trainers' runs with one harm each: who names it, and whether what `gather` writes is what it writes of the sound run.

Harms that no file contradicts are left out: values that are others in one place, names of two parameters of one shape
exchanged, places of two pieces of one size exchanged.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle  # noqa: TID251
import random
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from converter.cli import main
from converter.errors import ConvertError
from converter.examine.doctor import DoctorRequest, examine
from places import RUNS as SAVED
from shards import Stub

Tensors = dict[str, torch.Tensor]
Harm = Callable[[Path, random.Random], str]

PLACES = ("zero/runs", "zero/universal_runs", "zero/wrapped_runs", "zero/split_runs", "dcp/runs", "verl_saves/runs",
          "mcore/runs", "mcore/trained")  # fmt: skip
_NOT_GATHERED = ("hf-n2", "fsdp1-n2", "critic-buffers-fsdp1-n2")
"""Of these `gather` refuses the sound run."""
RUNS = sorted(p for place in PLACES for p in (SAVED / place).iterdir() if p.is_dir() and p.name not in _NOT_GATHERED)
_ASKED = {"lora-alpha-unknown": ("--lora-alpha", "8"), "config-missing": ("--emit", "state"),
          "several-parts": ("--part", "policy")}  # fmt: skip
"""What answers a refusal of a sound run."""

OF_VALUES = ("nan", "huge", "zeroed")
"""Harms that are written as they are, and named: no numbers are put in their place."""
_OF_LISTS = ("listed shape", "metadata", "tensor renamed", "tensor removed")
"""Harms to what names and shapes are known by, where no config.json is."""
_OURS = ("fixture.json", "oracle.safetensors", "config-of-run.json", "config-of-peft.json", "live.safetensors")


class NoPlaceError(Exception):
    """The harm has no place in what was drawn."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("deepspeed"):
            return Stub
        return str if module.startswith("megatron") else super().find_class(module, name)


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    reading = types.ModuleType("reading")
    vars(reading).update(vars(pickle), Unpickler=_Unpickler)
    state = torch.load(path, weights_only=False, pickle_module=reading)  # noqa: TID251
    change(state)
    torch.save(state, path)


def _files(run: Path) -> list[Path]:
    found = [p for p in run.rglob("*") if p.is_file() and p.name not in _OURS]
    return sorted(p for p in found if p.relative_to(run).parts[0] != "hf")


def _torch_files(run: Path) -> list[Path]:
    others = ("scheduler", "rng", "training_args", "optimizer", "optim_world", "extra_state")
    files = [p for p in _files(run) if p.suffix in (".pt", ".bin", ".pth") and not p.name.startswith(others)]
    return [p for p in files if "optimizer" not in p.parent.name and p.name != "common.pt"]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, key))


def _is_weight(path: tuple[Any, ...]) -> bool:
    words = "/".join(map(str, path))
    others = ("exp_avg", "optimizer_state_dict/optimizer", "base_optimizer_state", "rng", "step", "/state/")
    return not any(w in words for w in others)


def _of_file(kind: str) -> Harm:
    def harm(run: Path, draw: random.Random) -> str:
        files = _files(run)
        path = draw.choice(files)
        raw = path.read_bytes()
        if kind == "missing":
            path.unlink()
        elif kind == "cut short":
            path.write_bytes(raw[: draw.choice((0, len(raw) // 2, max(0, len(raw) - 100)))])
        else:
            alike = [q for q in files if q != path and q.parent == path.parent and q.suffix == path.suffix]
            alike = [q for q in alike if q.name[:4] == path.name[:4] and q.read_bytes() != raw]
            if not alike or path.suffix == ".distcp":
                raise NoPlaceError  # records of torch's distributed checkpoints have no names
            other = draw.choice(alike)
            theirs = other.read_bytes()
            other.write_bytes(raw)
            if kind == "exchanged":
                path.write_bytes(theirs)
        return str(path.relative_to(run))

    return harm


def _changed(kind: str, value: torch.Tensor, draw: random.Random) -> torch.Tensor:
    if kind == "halved":
        half = value.shape[0] // 2
        if not half:
            raise NoPlaceError
        return value[:half].clone()
    if kind == "zeroed":
        if not value.any() or value.dim() < 2 or min(value.shape) < 2:
            raise NoPlaceError  # biases and norms of zeros are how training begins
        return torch.zeros_like(value)
    made = value.clone()
    huge = 6e4 if value.dtype == torch.float16 else 1e30
    made.view(-1)[draw.randrange(value.numel())] = float("nan") if kind == "nan" else huge
    return made


def _of_tensor(kind: str) -> Harm:
    def harm(run: Path, draw: random.Random) -> str:
        files = _torch_files(run)
        if not files:
            raise NoPlaceError
        path = draw.choice(files)
        said: list[str] = []

        def change(state: Any) -> None:
            found = [(k, t) for k, t in _leaves(state) if k and _is_weight(k) and t.is_floating_point()]
            found = [(k, t) for k, t in found if _local(t).numel() > 1 and t.dim()]
            if not found:
                raise NoPlaceError
            place, tensor = draw.choice(found)
            said.append(f"{path.name}: {'/'.join(map(str, place))}")
            inside = state
            for key in place[:-1]:
                inside = inside[key]
            last = place[-1]
            if kind == "removed":
                inside.pop(last)
            elif kind == "renamed":
                if not isinstance(last, str):
                    raise NoPlaceError
                inside[f"{last}_old"] = inside.pop(last)
            else:
                made = _changed(kind, _local(tensor).detach(), draw)
                is_sharded = isinstance(tensor, DTensor)
                inside[last] = DTensor(made, tensor._spec, requires_grad=False) if is_sharded else made

        _edit(path, change)
        return said[0]

    return harm


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _of_shapes(kind: str) -> Harm:
    """What DeepSpeed lists of the parameters, in every rank's file alike."""

    def harm(run: Path, draw: random.Random) -> str:
        files = [p for p in _torch_files(run) if "model_states" in p.name]
        seed, said = draw.random(), []

        def change(state: Any) -> None:
            again = random.Random(seed)
            group = again.choice(state.get("param_shapes") or [{}])
            names = [n for n, s in group.items() if len(s) == 2 and s[0] != s[1]]
            if not names:
                raise NoPlaceError
            name = again.choice(names)
            rows, columns = group[name]
            if kind == "turned":
                group[name] = torch.Size((columns, rows))
            elif kind == "one row more":
                group[name] = torch.Size((rows + 1, columns))
            elif kind == "gone":
                del group[name]
            else:
                held = {f"{n}_old" if n == name else n: s for n, s in group.items()}
                group.clear()
                group.update(held)
            said.append(name)

        for path in files:
            _edit(path, change)
        if not said:
            raise NoPlaceError
        return said[0]

    return harm


def _of_metadata(kind: str) -> Harm:
    """What torch's `.metadata` says of a tensor."""

    def harm(run: Path, draw: random.Random) -> str:
        files = [p for p in run.rglob(".metadata") if "optimizer" not in p.parent.name]
        if not files:
            raise NoPlaceError
        path = draw.choice(sorted(files))
        try:
            held = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except AttributeError:
            raise NoPlaceError from None  # a class of Megatron's own, which is not installed
        tensors = {n: v for n, v in held.state_dict_metadata.items() if getattr(v, "size", None) and "opt" not in n}
        if not tensors:
            raise NoPlaceError
        name = draw.choice(sorted(tensors))
        value, keys = tensors[name], [k for k in held.storage_data if k.fqn == name]
        if kind == "another size":
            size = list(value.size)
            at = draw.randrange(len(size))
            size[at] = draw.choice((size[at] * 2, size[at] + 1))
            value.size = torch.Size(size)
        elif kind == "without a piece":
            value.chunks.pop(draw.randrange(len(value.chunks)))
        elif kind == "without a place":
            del held.storage_data[draw.choice(sorted(keys, key=str))]
        else:
            del held.state_dict_metadata[name]
        path.write_bytes(pickle.dumps(held, protocol=2))
        return name

    return harm


def _of_latest(run: Path, draw: random.Random) -> str:
    names = ("latest", "latest_universal", "latest_checkpointed_iteration.txt")
    files = sorted(p for p in run.rglob("*") if p.name in names)
    if not files:
        raise NoPlaceError
    path = draw.choice(files)
    path.write_text(draw.choice(("global_step99", "77", "../other", "")))
    return path.name


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


def _of_config(run: Path, draw: random.Random) -> str:
    files = sorted(run.rglob("config.json"))
    if not files:
        raise NoPlaceError
    path = draw.choice(files)
    config = json.loads(path.read_text())
    keys = [k for k in _SIZES if isinstance(config.get(k), int)]
    if not keys:
        raise NoPlaceError
    key = draw.choice(keys)
    config[key] = config[key] * 2
    path.write_text(json.dumps(config))
    return key


HARMS: dict[str, Harm] = {
    **{f"file {k}": _of_file(k) for k in ("missing", "cut short", "copied over another", "exchanged")},
    **{f"tensor {k}": _of_tensor(k) for k in ("removed", "renamed", "halved", *OF_VALUES)},
    **{f"listed shape {k}": _of_shapes(k) for k in ("turned", "one row more", "gone", "renamed")},
    **{f"metadata {k}": _of_metadata(k) for k in ("another size", "without a piece", "without a place", "gone")},
    "latest elsewhere": _of_latest,
    "config of another size": _of_config,
}


@dataclass(frozen=True)
class Outcome:
    """One case; `wrong` is empty where nothing is."""

    case: str
    kind: str
    place: str
    wrong: str = ""


@dataclass
class Sound:
    """Sound runs and what `gather` writes of each, made once below a folder."""

    root: Path
    held: dict[Path, tuple[Path, tuple[str, ...], Tensors, frozenset[str]]] = field(default_factory=dict)

    def run(self, saved: Path) -> tuple[Path, tuple[str, ...], Tensors, frozenset[str]]:
        """A copy without what is only ours, the options that it needs, its weights, and doctor's codes of it."""
        if saved not in self.held:
            folder = self.root / f"{saved.parent.parent.name}-{saved.parent.name}-{saved.name}" / saved.name
            shutil.copytree(saved, folder, ignore=shutil.ignore_patterns(*_OURS))
            options: tuple[str, ...] = ()
            out = folder.parent / "out"
            while (code := _told("gather", str(folder), str(out), "-q", *options))[0]:
                answer = next((w for c, w in _ASKED.items() if c in code[1] and w[0] not in options), None)
                assert answer is not None, (saved, code)
                options += answer
            self.held[saved] = folder, options, _weights(out), frozenset(_codes(folder))
        return self.held[saved]


def _told(*words: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(list(words))
    return code, said.getvalue()


def _weights(folder: Path) -> Tensors:
    return {n: t for p in sorted(folder.rglob("*.safetensors")) for n, t in load_file(p).items()}


def _codes(folder: Path) -> list[str]:
    """What is worse than cosmetic; what can't be examined says so itself."""
    try:
        found = examine(DoctorRequest(str(folder), deep=True)).findings
    except ConvertError as error:
        return [error.code]
    return [f.code for f in found if f.severity != "cosmetic"]


def _differs(got: Tensors, wanted: Tensors) -> str:
    if got.keys() != wanted.keys():
        return f"names {sorted(got.keys() ^ wanted.keys())[:2]}"
    for name, tensor in got.items():
        other = wanted[name]
        is_same = tensor.dtype == other.dtype and tensor.shape == other.shape
        if not is_same or not tensor.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)):
            return name
    return ""


def case(sound: Sound, saved: Path, seed: int, kind: str | None = None) -> Outcome | None:
    """One harm to one run; None where it has no place, or changes nothing that is gathered and stops nobody."""
    folder, options, wanted, known = sound.run(saved)
    draw = random.Random(f"{saved.name} {seed}")
    kind = kind or draw.choice(sorted(HARMS))
    with tempfile.TemporaryDirectory(dir=sound.root) as scratch:
        harmed = Path(shutil.copytree(folder, Path(scratch) / saved.name))
        try:
            place = HARMS[kind](harmed, draw)
        except NoPlaceError:
            return None
        named = [c for c in _codes(harmed) if c not in known]
        out = Path(scratch) / "out"
        code, said = _told("gather", str(harmed), str(out), "-q", *options)
        differs = _differs(_weights(out), wanted) if not code else None
        if differs and "state" in options and kind.startswith(_OF_LISTS):
            return None  # of a class of the user's own nothing says more than the lists themselves
        wrong = _wrong(kind, place, named, code, said, differs, out)
        return None if wrong is None else Outcome(saved.name, kind, place, wrong)


def _wrong(kind: str, place: str, named: list[str], code: int, said: str, differs: str | None, out: Path) -> str | None:
    """What is wrong with our answer; None where the harm is none."""
    if differs == "":
        return None
    is_of_values = kind.rsplit(maxsplit=1)[-1] in OF_VALUES
    has_config = (out / "config.json").is_file()
    if differs is not None and not (is_of_values and (named or not has_config)):
        return f"gather wrote other weights: {differs}"
    is_embedding = differs is not None and "embed" in differs  # rows of tokens that nobody has are zero, too
    if differs is not None and has_config and not is_embedding and _told("verify", str(out))[0] == 0:
        return f"verify passes {differs}"
    if code not in (0, 2, 3, 4):
        return f"gather exits {code}: {said[-200:]}"
    is_config_gone = kind == "file missing" and place.endswith(("config.json", "adapter_config.json"))
    if not named and differs is None and not is_config_gone:
        return f"doctor is silent, and gather refuses: {' '.join(said.split())[:160]}"
    return ""


def cases(count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Runs in turn with seeds of their own."""
    for number in range(count):
        yield RUNS[number % len(RUNS)], seed + number
