"""Feeds mutated torch files and trainers' folders to everything that reads them, within 1 GB of address space.

    python tests/fuzz/fuzz_pickles.py SCRATCH FOLDER... [--seconds 30] [--cases N] [--seed 0] [--only N]

Every case is made from the seed and its number alone, so that `--only N` repeats one. A case ends with a value or with
a `ConvertError`; anything else (another exception, more memory, more than `HANG` seconds) stops the run with exit code
1 and the number. Prints one JSON object: how many cases, how many of them gave values, and the codes of the refusals.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import random
import resource
import shutil
import sys
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converter.converters.gather.gather import Gather
from converter.core.context import Context
from converter.core.formats.torch_file import read_torch_file
from converter.core.tensors.nodes import LazyTensor
from converter.core.writer.plan import make_plan
from converter.errors import ConvertError
from converter.sources.finding import find_place, sources

ADDRESS_SPACE = 1_000_000_000
HANG = 20
MAX_TENSOR = 10_000_000
"""Bytes; no file that is mutated here is as large."""

PICKLED = (".pt", ".bin", ".distcp", ".metadata")
INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"(", b")", b"]", b"}", b"t", b"R", b"b", b".", b"\x94", b"\x88")
NUMBERS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x8000000000000000, 1 << 40)


def changed(raw: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, put in from elsewhere, or the end cut off."""
    data = bytearray(raw)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        at = dice.randrange(len(data)) if data else 0
        length = dice.choice((1, 2, 4, 8, 64))
        match dice.randrange(7):
            case 0 if data:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at : at + 1] = dice.choice(INTERESTING)
            case 2:
                width = dice.choice((2, 4, 8))
                data[at : at + width] = (dice.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                other = dice.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case _:
                if dice.random() < 0.2:
                    del data[at:]
    return bytes(data)


def changed_inside(raw: bytes, dice: random.Random) -> bytes:
    """A zip whose pickle is changed, with sound checksums around it; other files are changed as they are."""
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        return changed(raw, dice)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    name = next((n for n in entries if n.endswith("data.pkl")), None)
    if name is None:
        return changed(raw, dice)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for each, content in (entries | {name: changed(entries[name], dice)}).items():
            archive.writestr(each, content)
    return out.getvalue()


def expect_sound(tensors: Any) -> None:
    """No tensor claims more than its file can hold."""
    for tensor in tensors:
        assert not isinstance(tensor, LazyTensor) or tensor.info.nbytes < MAX_TENSOR, tensor.info


def read_file(path: Path) -> None:
    """The reader alone."""
    value = read_torch_file(path).value
    expect_sound(value.values() if isinstance(value, dict) else ())


def read_folder(folder: Path) -> None:
    """All that `inspect` and `gather` do before a byte is written; each step may be refused alone."""
    first: ConvertError | None = None
    root = folder if any(folder.glob("pytorch_model*.bin")) else find_place(folder, "x").folder
    source = next(s for s in sources().values() if s.detect(root))
    expect_sound(getattr(e, "tensor", None) for e in source.survey(root).entries.values())
    masters = getattr(source, "open_masters", source.open)
    steps: list[Callable[[], Any]] = [lambda: _plan(source.open, root), lambda: _plan(masters, root)]
    for step in steps:
        try:
            step()
        except ConvertError as refused:
            first = first or refused
    if first is not None:
        raise first


def _plan(opened: Callable[..., Any], folder: Path) -> None:
    checkpoint = opened(folder, asked="x")
    expect_sound(checkpoint.tensors.values())
    context = Context()
    if checkpoint.origin.kind == "training":
        checkpoint = Gather(lora_alpha=8)(checkpoint.replace(config={"a": 1}), context)
    make_plan(checkpoint, context=context)


def run_case(number: int, seed: int, folders: list[Path], scratch: Path) -> None:
    """One mutated file, read alone, or in its folder among its sound neighbours."""
    dice = random.Random(f"{seed}-{number}")
    folder = dice.choice(folders)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.endswith(PICKLED))
    path = dice.choice(files)
    raw = path.read_bytes()
    mutated = dice.choice((changed, changed_inside, changed_inside))(raw, dice)
    if dice.random() < 0.5:
        alone = scratch / "alone.pt"
        alone.write_bytes(mutated)
        read_file(alone)
        return
    path.write_bytes(mutated)
    try:
        read_folder(folder)
    finally:
        path.write_bytes(raw)


def main() -> int:
    """Runs cases until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--cases", type=int, help="stop after so many, though time is left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this case")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    folders = [Path(shutil.copytree(f, given.scratch / str(i) / f.name)) for i, f in enumerate(given.folders)]
    found: Counter[str] = Counter()
    slowest, began, number = 0.0, time.monotonic(), given.only or 0
    while time.monotonic() - began < given.seconds or given.only is not None:
        faulthandler.dump_traceback_later(HANG, exit=True)
        start = time.monotonic()
        try:
            run_case(number, given.seed, folders, given.scratch)
            found["value"] += 1
        except ConvertError as refused:
            found[refused.code] += 1
        except BaseException:
            print(f"case {number} of seed {given.seed}", file=sys.stderr)
            traceback.print_exc()
            return 1
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - start)
        number += 1
        if given.only is not None or number == given.cases:
            break
    values = found.pop("value", 0)
    said = {"cases": values + found.total(), "values": values, "slowest": round(slowest, 3), "refused": dict(found)}
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
