"""What a case is, and the sound folders that most of them damage."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hostile.watched import FIXTURES
from places import RUNS

BASE, ADAPTER = FIXTURES / "tiny-qwen2-base", FIXTURES / "tiny-reward-adapter"
ZERO = RUNS / "zero" / "runs" / "reward-z2-n2"
DCP = RUNS / "dcp" / "runs" / "nested-n4"
VERL = RUNS / "verl_saves" / "runs" / "critic-fsdp2-n4"

REFUSED = {"diff": (1, 3), "inspect": (1,), "doctor": (1,), "verify": (3, 4)}
"""Exit codes of verbs for what is broken; 3 for all others."""

ON_MODEL = ("inspect m", "reshard m out")
"""What every broken model is shown to; every second one to one of the next ones, too, in turn."""

ALSO_ON_MODEL = (
    "doctor m",
    f"merge-lora {ADAPTER} out --base m",
    f"diff m {BASE}",
    "push m me/x --dry-run",
    "repair m out",
    "verify m --for openrlhf",
    "convert m out --to openrlhf --role reward",
    f"diff {BASE} m",
    f"run merge-reward-lora out --input adapter={ADAPTER} --input source=m",
)
ON_ADAPTER = ("inspect a", f"merge-lora a out --base {BASE}")
ALSO_ON_ADAPTER = (
    f"doctor a --base {BASE}",
    "push a me/x --dry-run",
    f"diff a {ADAPTER}",
    f"repair a out --base {BASE}",
    f"convert a out --to openrlhf --role reward --base {BASE}",
)
ON_RANKS = "reshard r out2 --world-size 3"
"""What a run of a trainer that has a file a rank is shown to as well."""

ON_RUN = ("inspect r", "gather r out", "doctor r", "convert r out --to openrlhf --role reward")


@dataclass(frozen=True)
class Case:
    """A hostile or damaged input.

    Attributes:
        row: of the threat table in SECURITY.md.
        build: writes it into an empty folder.
        lines: command lines that are run there.
        file: what each refused command must name; nothing for a fault that concerns no file.
        says: the refusal's code, or words of it; `a|b` is either of two.
        exits: exit codes by verb where they are not those of `REFUSED`.
        closed: names of files that must not be opened.
        harmless: the commands do what they are for, without taking the attack along.
        absent: names that must not be in the output.
    """

    name: str
    row: int
    build: Callable[[Path], None]
    lines: tuple[str, ...]
    file: str = ""
    says: str = ""
    exits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    closed: tuple[str, ...] = ()
    harmless: bool = False
    absent: tuple[str, ...] = ()

    def codes(self, line: str) -> tuple[int, ...]:
        """Exit codes that are right for a command line."""
        verb = line.partition(" ")[0]
        if verb in self.exits:
            return self.exits[verb]
        return (0,) if self.harmless else REFUSED.get(verb, (3,))


def in_turn(cases: list[Case]) -> list[Case]:
    """Every second case of a model or an adapter with one more command line, in turn."""
    more = {ON_MODEL: ALSO_ON_MODEL, ON_ADAPTER: ALSO_ON_ADAPTER}
    found = []
    for number, case in enumerate(cases):
        others = more.get(case.lines) if number % 2 else None
        lines = case.lines if others is None else (*case.lines, others[number // 2 % len(others)])
        found.append(replace(case, lines=lines))
    return found


Content = bytes | Callable[[], bytes]
"""Of a file; a large one is made when it is written, not where the cases are collected."""


def content_of(given: Content) -> bytes:
    """The bytes themselves."""
    return given if isinstance(given, bytes) else given()


def model(folder: Path, name: str = "m") -> Path:
    """A sound model of two shards with its index, to be damaged."""
    return Path(shutil.copytree(BASE, folder / name))


def adapter(folder: Path, name: str = "a") -> Path:
    """A sound adapter, to be damaged."""
    return Path(shutil.copytree(ADAPTER, folder / name))


def run(folder: Path, source: Path) -> Path:
    """A sound run of a trainer, to be damaged."""
    kept = shutil.ignore_patterns("fixture.json", "oracle*")
    return Path(shutil.copytree(source, folder / "r", ignore=kept))


def with_config(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file; numbers may be given as `Raw` text."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(value))


def without_weights(folder: Path) -> Path:
    """The model without its shards and index: config and tokenizer are left."""
    root = model(folder)
    for each in (*root.glob("*.safetensors"), root / "model.safetensors.index.json"):
        each.unlink()
    # What comes next may be one tensor, which is the whole of no class that is known.
    with_config(root / "config.json", model_type="unheard-of", architectures=["UnheardOf"], num_hidden_layers=0)
    return root


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, lies included."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
