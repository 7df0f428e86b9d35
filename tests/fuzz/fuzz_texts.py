"""Feeds mutated headers, indexes, configs, recipes and logs to the command line, within 1 GB of address space.

    python tests/fuzz/fuzz_texts.py SCRATCH [--seconds 10] [--cases N] [--seed 0] [--only N]

As `fuzz_pickles.py`, whose mutations it shares: a case is made from the seed and its number alone. Each is refused or
done, soon, in printable words, with nothing new on the disk; anything else stops the run with exit code 1 and its
number.
Prints one JSON object: how many cases, of each kind and with each exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from converter.cli import main as command
from converter.shipped import shipped
from fuzz_pickles import HANG, changed

FIXTURES = shipped("fixtures")
SPACE = 1_000_000_000
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**31, 2**63, 10**30, 10**400, float("nan"), float("inf"), "", "x", "../../x", "/etc/x",
    "a\0b", "\x1b[2J", "\ud800", "\u202e", [], {}, [[]], {"a": {}}, [0] * 100, ["x", 5, None], {"x": [1]}, "(a+)+$",
    "x" * 5000,
)  # fmt: skip
RECIPE = """version: 1
inputs:
  source: base
  adapter: {path: adapter, revision: null}
steps:
  - merge-lora: {adapters: [adapter], weights: [1.0], numerics: best}
  - cast: {dtype: bfloat16}
output: {layout: pack, max-shard-size: 5GB}
"""
LOG = (
    "Some weights of Qwen2ForSequenceClassification were not initialized from the model checkpoint at x and are newly "
    "initialized: ['score.weight']\nRuntimeError: Error(s) in loading state_dict for X:\n\tsize mismatch for "
    "score.weight: copying a param with shape torch.Size([0]) from checkpoint, the shape in current model is [1].\n"
    "score.weight | MISSING |\nKeyError: 'layers.0.base_layer.weight'\nUnexpected key(s) in state_dict: "
    '"a.lora_A.weight"\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB\nfsdp_config.json not found\n"
)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "header": ("base/model-00001-of-00002.safetensors", ("inspect base", "reshard base out --dry-run")),
    "index": ("base/model.safetensors.index.json", ("inspect base", "reshard base out --dry-run")),
    "config": ("base/config.json", ("inspect base", "merge-lora adapter out --base base --dry-run")),
    "adapter": ("adapter/adapter_config.json", ("inspect adapter", "merge-lora adapter out --base base --dry-run")),
    "tokenizer": ("base/tokenizer_config.json", ("doctor base", "push base me/x --dry-run")),
    "recipe": ("recipe.yaml", ("run recipe.yaml out --dry-run",)),
    "log": ("train.log", ("explain train.log",)),
}


def changed_value(value: Any, dice: random.Random) -> Any:
    """A JSON value with one value in it, a key or an item of a list replaced, doubled or taken out."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.15:
        return dice.choice(VALUES)
    if isinstance(value, list):
        at = dice.randrange(len(value))
        other = dice.choice(([changed_value(value[at], dice)], [], [value[at]] * 2))
        return [*value[:at], *other, *value[at + 1 :]]
    key = dice.choice(list(value))
    new = dice.choice((key, key, key, "../x", "\x1b[2J", "", "x" * 2000))
    return {(new if k == key else k): (changed_value(v, dice) if k == key else v) for k, v in value.items()}


def mutated(kind: str, raw: bytes, dice: random.Random) -> bytes:
    """The file's bytes changed anywhere, or its JSON changed and written well-formed."""
    head = raw[: 8 + struct.unpack("<Q", raw[:8])[0]] if kind == "header" else raw
    text = head[8:] if kind == "header" else head
    is_json = kind in ("header", "index", "config", "adapter", "tokenizer")
    if is_json and dice.random() < 0.7:
        value = changed_value(json.loads(text), dice)
        text = json.dumps(value, ensure_ascii=dice.random() < 0.5).encode("utf-8", "surrogatepass")
    else:
        text = changed(text, dice)
    if kind != "header":
        return text
    length = len(text) if dice.random() < 0.9 else dice.choice((0, 7, len(text) + 1, 2**40, 2**64 - 1))
    return struct.pack("<Q", length) + text + raw[len(head) :]


def run_case(number: int, seed: int, folder: Path, found: Counter[str]) -> None:
    """One mutated file among its sound neighbours, and the commands that read it."""
    dice = random.Random(f"{seed}-{number}")
    kind = dice.choice(list(KINDS))
    name, lines = KINDS[kind]
    path = folder / name
    sound = path.read_bytes()
    path.write_bytes(mutated(kind, sound, dice))
    try:
        for line in lines:
            screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
            with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
                code = command(line.split())
            screen.flush()
            expect_clean(line, code, screen.buffer.getvalue().decode())  # type: ignore[attr-defined]
            found[f"{kind} exit {code}"] += 1
    finally:
        path.write_bytes(sound)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "base", "recipe.yaml", "train.log"]


def expect_clean(line: str, code: int, text: str) -> None:
    """What every command owes to whoever typed it."""
    assert code in (0, 1, 2, 3), f"{line}: exit {code}\n{text}"
    assert "Traceback" not in text
    assert all(c == "\n" or c.isprintable() for c in text), f"{line} prints {text!r}"
    assert len(text) < 50_000, f"{line} prints {len(text)} characters"


def main() -> int:
    """Runs cases until the time is up and there were enough of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--cases", type=int, default=0, help="at least so many, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this case")
    given = parser.parse_args()
    folder = given.scratch / "texts"
    shutil.copytree(FIXTURES / "tiny-qwen2-base", folder / "base")
    shutil.copytree(FIXTURES / "tiny-reward-adapter", folder / "adapter")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "train.log").write_text(LOG)
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPACE,) * 2)
    found: Counter[str] = Counter()
    slowest, number = 0.0, given.only or 0
    began: float | None = None
    while began is None or number < given.cases or time.monotonic() - began < given.seconds:
        faulthandler.dump_traceback_later(HANG, exit=True)
        start = time.monotonic()
        try:
            run_case(number, given.seed, folder, found)
        except BaseException:
            print(f"case {number} of seed {given.seed}", file=sys.stderr)
            traceback.print_exc()
            return 1
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - start)
        number += 1
        if began is None:
            began = start  # the first case imports
        if given.only is not None:
            break
    print(json.dumps({"cases": number, "slowest": round(slowest, 3), "ended": dict(sorted(found.items()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
