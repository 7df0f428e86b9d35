"""Zips that two readers would read in two ways, tensors that don't fit their bytes, and bits that rotted."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hostile.cases import (
    ADAPTER,
    DCP,
    ON_MODEL,
    ON_RANKS,
    ON_RUN,
    VERL,
    ZERO,
    Case,
    entry,
    model,
    run,
    safetensors,
    with_config,
    without_weights,
)
from hostile.pickles import in_model, zipped

FLOATS = struct.pack("<16f", *range(16))


def number(value: Any) -> bytes:
    """A number, or something else that a number is expected to be, in a pickle."""
    if value is True:
        return b"\x88"
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return b"N" if value is None else b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(values: Any) -> bytes:
    """A tuple of them."""
    return b"(" + b"".join(map(number, values)) + b"t" if isinstance(values, tuple) else number(values)


def tensor(
    *,
    offset: Any = 0,
    size: Any = (4, 4),
    stride: Any = (4, 1),
    key: str = "0",
    count: Any = 16,
    kind: str = "FloatStorage",
) -> bytes:
    """`{"w": tensor}` as torch.save writes it, with whatever numbers."""
    storage = (
        b"("
        + number("storage")
        + b"ctorch\n"
        + kind.encode()
        + b"\n"
        + number(key)
        + number("cpu")
        + number(count)
        + b"tQ"
    )
    args = b"(" + storage + number(offset) + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}" + number("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + args + b"Rs."


TENSORS: dict[str, dict[str, Any]] = {
    "beyond": {"size": (17,), "stride": (1,)},
    "offset-beyond": {"offset": 10, "size": (7,), "stride": (1,)},
    "offset-negative": {"offset": -1},
    "offset-fraction": {"offset": 0.5},
    "offset-2-100": {"offset": 2**100},
    "size-negative": {"size": (-4,), "stride": (1,)},
    "size-2-61": {"size": (2**61, 2**61), "stride": (1, 1)},
    "size-fraction": {"size": (4.0, 4), "stride": (4, 1)},
    "size-true": {"size": (True, 4), "stride": (4, 1)},
    "size-text": {"size": "4"},
    "size-none": {"size": None},
    "stride-zero": {"size": (10**6, 10**6), "stride": (0, 0)},
    "stride-negative": {"offset": 15, "size": (4,), "stride": (-1,)},
    "stride-2-61": {"size": (2,), "stride": (2**61,)},
    "ranks-differ": {"size": (4,), "stride": (1, 1)},
    "storage-longer": {"count": 17},
    "storage-shorter": {"count": 3, "size": (3,), "stride": (1,)},
    "storage-negative": {"count": -16, "size": (0,), "stride": (1,)},
    "storage-missing": {"key": "7"},
    "storage-path": {"key": "../../etc/passwd"},
    "storage-wider": {"kind": "DoubleStorage"},
    "storage-unknown": {"kind": "PlantedStorage"},
    "storage-escapes": {"key": "\x1b[2J"},
}


def _sound() -> bytes:
    return zipped(tensor(), {"0": FLOATS})


def _central(raw: bytes, name: bytes) -> int:
    """Where the central directory's entry of a name begins."""
    return raw.rindex(name) - 46


def _patched(name: bytes, at: int, data: bytes) -> bytes:
    raw = _sound()
    start = _central(raw, name) + at
    return raw[:start] + data + raw[start + len(data) :]


def _made(entries: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = how
            # Not through writestr, which warns of a name that comes twice.
            archive.NameToInfo.pop(name, None)
            archive.writestr(info, data)
    return out.getvalue()


_PICKLE, _DATA = ("x/data.pkl", tensor()), ("x/data/0", FLOATS)
_END = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0)
S = b"archive/data/0"
ZIPS: dict[str, Callable[[], bytes]] = {
    "entry-twice": lambda: _made([_PICKLE, _DATA, ("x/data/0", b"\1" * 64)]),
    "pickle-twice": lambda: _made([_PICKLE, _DATA, _PICKLE]),
    "two-pickles": lambda: _made([_PICKLE, _DATA, ("y/data.pkl", tensor())]),
    "no-pickle": lambda: _made([_DATA]),
    "scripted": lambda: _made([("x/constants.pkl", tensor()), ("x/code/planted.py", b"import os")]),
    "compressed": lambda: _made([_PICKLE, _DATA], zipfile.ZIP_DEFLATED),
    "bomb": lambda: _made([_PICKLE, ("x/data/0", b"\0" * 200_000_000)], zipfile.ZIP_DEFLATED),
    "pickle-bomb": lambda: _made([("x/data.pkl", b"\0" * 200_000_000), _DATA], zipfile.ZIP_DEFLATED),
    "big-endian": lambda: _made([_PICKLE, _DATA, ("x/byteorder", b"big")]),
    "above": lambda: _made([("../../x/data.pkl", b"\x80\x02N."), _DATA]),
    "name-of-another": lambda: _patched(S, 46, b"archive/data/9"),
    "place-of-another": lambda: _patched(S, 42, struct.pack("<I", 0)),
    "place-outside": lambda: _patched(S, 42, struct.pack("<I", 10**9)),
    "size-outside": lambda: _patched(S, 20, struct.pack("<II", 10**9, 10**9)),
    "sizes-differ": lambda: _patched(S, 24, struct.pack("<I", 32)),
    "zip64-lies": lambda: _patched(S, 20, b"\xff" * 8),
    "encrypted": lambda: _patched(S, 8, struct.pack("<H", 1)),
    "strongly-encrypted": lambda: _patched(S, 8, struct.pack("<H", 0x41)),
    "said-compressed": lambda: _patched(S, 10, struct.pack("<H", 8)),
    "unknown-method": lambda: _patched(S, 10, struct.pack("<H", 99)),
    "version-63": lambda: _patched(S, 6, struct.pack("<H", 255)),
    "pickle-checksum": lambda: _patched(b"archive/data.pkl", 16, b"\1\2\3\4"),
    "overlap": lambda: _patched(S, 20, struct.pack("<II", 120, 120)),
    "cut": lambda: _sound()[:-30],
    "end-alone": lambda: b"PK\3\4" + b"\0" * 30 + _END,
    "directory-outside": lambda: _sound()[:-6] + struct.pack("<I", 2**31) + b"\0\0",
    "two-ends": lambda: _sound() + _END,
    "in-a-comment": lambda: _made([_PICKLE])[:-2] + struct.pack("<H", len(_sound())) + _sound(),
}
ROTTEN = {
    "bit-rot": (11, lambda: _rotten(FLOATS)),
    "checksum-of-another": (11, lambda: _patched(S, 16, struct.pack("<I", zlib.crc32(b"x")))),
}


def _rotten(data: bytes) -> bytes:
    raw = _sound()
    at = raw.index(data)
    return raw[:at] + b"\x01" + raw[at + 1 :]


def _late(make: Callable[[], bytes], folder: Path) -> None:
    """A zip that is made when it is needed: a bomb takes a moment."""
    in_model(make(), folder)


def _in_zero(make: Callable[[], bytes], folder: Path) -> None:
    root = run(folder, ZERO)
    min(root.rglob("*optim_states.pt")).write_bytes(make())


def _cut(source: Path, pattern: str, folder: Path) -> None:
    path = min(run(folder, source).rglob(pattern))
    path.write_bytes(path.read_bytes()[:-200])


def _zeros(source: Path, pattern: str, folder: Path) -> None:
    path = min(run(folder, source).rglob(pattern))
    path.write_bytes(b"\0" * path.stat().st_size)


def _gone(source: Path, pattern: str, folder: Path) -> None:
    min(run(folder, source).rglob(pattern)).unlink()


def _swapped(source: Path, pattern: str, folder: Path) -> None:
    first, second = sorted(run(folder, source).rglob(pattern))[:2]
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)


def _ranks_of(digits: str, folder: Path) -> None:
    """A rank file whose name says that there are more of them than anybody has."""
    path = min(run(folder, VERL).rglob("model_world*_rank_1.pt"))
    path.rename(path.with_name(f"model_world_size_{digits}_rank_1.pt"))


def _values(data: bytes, dtype: str, folder: Path) -> None:
    root = without_weights(folder)
    (root / "model.safetensors").write_bytes(safetensors({"w": entry([len(data) // 4], 0, len(data), dtype)}, data))


def _nan_in_base(folder: Path) -> None:
    path = model(folder) / "model-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-64:] = b"\xff" * 64
    path.write_bytes(bytes(raw))
    with_config(folder / "m" / "config.json", architectures=["Qwen2ForCausalLM"])


_NAN = struct.pack("<4f", 1.0, float("nan"), float("inf"), -float("inf"))
_LARGE = struct.pack("<4f", 1.0, 1e30, -1e30, 3.0)
_PARTS = (
    ("zero-model", ZERO, "*model_states.pt"), ("zero-optimizer", ZERO, "*optim_states.pt"),
    ("dcp-metadata", DCP, ".metadata"), ("dcp-data", DCP, "*.distcp"), ("verl-model", VERL, "model_world*"),
)  # fmt: skip

CASES: list[Case] = [
    *(
        Case(
            f"tensor-{n}",
            10,
            partial(in_model, zipped(tensor(**lie), {"0": FLOATS})),
            ON_MODEL,
            "pytorch_model.bin",
            "torch-tensor",
        )
        for n, lie in TENSORS.items()
    ),
    *(
        Case(
            f"zip-{n}",
            8,
            partial(_late, make),
            ON_MODEL,
            "pytorch_model.bin",
            "torch-zip|file-truncated|torch-tensor|pickled-not-weights",
        )
        for n, make in ZIPS.items()
    ),
    *(
        Case(
            f"zip-{n}-of-zero",
            8,
            partial(_in_zero, ZIPS[n]),
            (*ON_RUN[:2], ON_RANKS),
            "optim_states.pt",
            "torch-zip|file-truncated",
        )
        for n in ("bomb", "entry-twice", "overlap", "cut")
    ),
    *(
        Case(
            f"{n}",
            row,
            partial(_late, make),
            ("reshard m out",),
            "pytorch_model.bin",
            "checksum",
            exits={"reshard": (3,)},
        )
        for n, (row, make) in ROTTEN.items()
    ),
    *(
        Case(
            f"cut-{n}",
            20,
            partial(_cut, source, pattern),
            (*ON_RUN[:3], ON_RANKS),
            exits={"inspect": (0, 1), "doctor": (0, 1)},
        )
        for n, source, pattern in _PARTS
    ),
    *(
        Case(f"zeros-{n}", 20, partial(_zeros, source, pattern), (*ON_RUN[:3], ON_RANKS))
        for n, source, pattern in _PARTS
    ),
    *(
        Case(
            f"gone-{n}",
            20,
            partial(_gone, source, pattern),
            (ON_RUN[1], ON_RANKS),
            exits={"gather": (2, 3), "reshard": (2, 3)},
        )
        for n, source, pattern in _PARTS
        if n != "zero-optimizer"
    ),
    Case("swapped-dcp-data", 20, partial(_swapped, DCP, "*.distcp"), ON_RUN[1:2]),
    *(Case(f"ranks-{n}", 19, partial(_ranks_of, n), (*ON_RUN[:3], ON_RANKS)) for n in ("5", "999999", "9" * 100)),
    Case(
        "values-not-finite",
        21,
        partial(_values, _NAN, "F32"),
        ("inspect m", "reshard m out", "doctor m --deep"),
        exits={"doctor": (1,)},
        harmless=True,
    ),
    Case("values-not-finite-in-a-base", 21, _nan_in_base, (f"merge-lora {ADAPTER} out --base m",), harmless=True),
    Case(
        "values-overflow",
        21,
        partial(_values, _LARGE, "F32"),
        ("reshard m out --dtype fp16",),
        says="finite",
        exits={"reshard": (4,)},
    ),
]
