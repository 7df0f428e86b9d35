"""safetensors headers that lie, and index files that do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hostile.cases import BASE, ON_MODEL, Case, Content, content_of, entry, model, safetensors, without_weights

FOUR = entry([1], 0, 4)
DATA = b"\0" * 4
INDEX = "model.safetensors.index.json"


def one(**changes: Any) -> bytes:
    """One float, with one lie about it."""
    return safetensors({"w": FOUR | changes}, DATA)


def named(name: str) -> bytes:
    """One float under a name."""
    return safetensors({name: FOUR}, DATA)


def text(value: str) -> bytes:
    """One float under a header that is this text."""
    return safetensors(value.encode(), DATA)


_W = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

HEADERS: dict[str, tuple[int, Content]] = {
    "empty": (12, b""),
    "seven-bytes": (12, b"\x02\0\0\0\0\0\0"),
    "zeros": (12, b"\0" * 4096),
    "web-page": (7, b"<!DOCTYPE html><html>not found</html>"),
    "git-lfs": (7, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
    "length-beyond-the-end": (12, safetensors({"w": FOUR}, DATA, length=10_000)),
    "length-of-2-64": (12, safetensors({"w": FOUR}, DATA, length=2**64 - 1)),
    "length-of-200-megabytes": (12, safetensors({"w": FOUR}, DATA, length=200_000_000)),
    "length-too-short": (12, safetensors({"w": FOUR}, DATA, length=20)),
    "not-json": (12, text("{w}")),
    "array": (12, text("[1]")),
    "number": (12, text("{} 5")),
    "bracket-bomb": (12, lambda: text('{"w":' + "[" * 3_000_000 + "]" * 3_000_000 + "}")),
    "depth-of-65": (12, text('{"w":' * 65 + "1" + "}" * 65)),
    "ten-million-lists": (12, lambda: text('{"w":[' + "[]," * 10_000_000 + "[]]}")),
    "ten-million-numbers": (12, lambda: text('{"w":[' + "1.5," * 10_000_000 + "1]}")),
    "million-tensors": (
        12,
        lambda: text(
            "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000)) + "}"
        ),
    ),
    "string-without-end": (12, lambda: text('{"w":"' + '\\"' * 2_000_000 + "}")),
    "number-of-5000-digits": (12, text('{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}')),
    "not-utf8": (12, safetensors(b'{"\xff":1}', DATA)),
    "byte-order-mark": (12, safetensors(b"\xef\xbb\xbf{}", DATA)),
    "nan": (12, text('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}')),
    "infinity": (12, text('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}')),
    "trailing-text": (12, text("{" + _W + "}x")),
    "tensor-twice": (13, text("{" + _W + "," + _W + "}")),
    "field-twice": (13, text('{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}')),
    "metadata-twice": (13, text('{"__metadata__":{"a":"b"},"__metadata__":{},' + _W + "}")),
    "metadata-number": (12, text('{"__metadata__":{"a":1},' + _W + "}")),
    "metadata-list": (12, text('{"__metadata__":[],' + _W + "}")),
    "field-unknown": (12, safetensors({"w": FOUR | {"x": 1}}, DATA)),
    "field-missing": (12, safetensors({"w": {"dtype": "F32", "shape": [1]}}, DATA)),
    "dtype-unknown": (12, one(dtype="F33")),
    "dtype-of-four-bits": (12, one(dtype="F4", shape=[7])),
    "dtype-number": (12, one(dtype=5)),
    "dtype-with-escapes": (25, one(dtype="\x1b[2J\x1b]0;x\x07")),
    "shape-negative": (10, one(shape=[-1])),
    "shape-fraction": (10, one(shape=[1.0])),
    "shape-boolean": (10, one(shape=[True])),
    "shape-text": (10, one(shape="1")),
    "shape-of-2-62": (10, one(shape=[2**62, 2**62])),
    "shape-of-65-dimensions": (10, one(shape=[1] * 65)),
    "shape-empty-and-absurd": (10, one(shape=[0, 2**62, 2**62], data_offsets=[0, 0])),
    "shape-longer": (10, one(shape=[2])),
    "offsets-reversed": (10, one(data_offsets=[4, 0])),
    "offsets-negative": (10, one(data_offsets=[-4, 0])),
    "offsets-fraction": (10, one(data_offsets=[0, 4.0])),
    "offsets-three": (10, one(data_offsets=[0, 4, 8])),
    "offsets-of-2-63": (10, one(data_offsets=[2**63, 2**63 + 4])),
    "cut-short": (20, safetensors({"w": entry([100], 0, 400)}, DATA)),
    "overlap": (10, safetensors({"v": entry([1], 0, 4), "w": entry([1], 0, 4)}, DATA)),
    "gap": (10, safetensors({"v": entry([1], 0, 4), "w": entry([1], 8, 12)}, b"\0" * 12)),
    "trailing-bytes": (10, safetensors({"w": FOUR}, DATA + b"PK\x03\x04")),
    "name-empty": (25, named("")),
    "name-above": (14, named("../../x")),
    "name-absolute": (14, named("/etc/passwd")),
    "name-nul": (25, named("a\0b")),
    "name-escapes": (25, named("\x1b[2J\x1b[1;1Hw")),
    "name-lines": (24, named("w\n---\nlicense: mit\n---")),
    "name-turned-around": (25, named("a\u202egnp")),
    "name-half-a-pair": (25, text('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')),
    "name-of-10000": (25, named("w" * 10_000)),
}


def single(raw: Content, folder: Path) -> None:
    """A model of one file."""
    (without_weights(folder) / "model.safetensors").write_bytes(content_of(raw))


def indexed(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    """A model whose index was changed; text is written as it is."""
    path = model(folder) / INDEX
    value = change(json.loads(path.read_text()))
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def pointing_to(file: Any) -> Callable[[dict[str, Any]], Any]:
    """One tensor is said to be in another file."""

    def change(index: dict[str, Any]) -> Any:
        first = next(iter(index["weight_map"]))
        return index | {"weight_map": index["weight_map"] | {first: file}}

    return change


def _swapped(index: dict[str, Any]) -> Any:
    files = sorted(set(index["weight_map"].values()))
    return index | {"weight_map": {n: files[files.index(f) - 1] for n, f in index["weight_map"].items()}}


_FILES = {
    "traversal": "../secret.safetensors",
    "absolute": "/etc/passwd.safetensors",
    "address": "http://x/y.safetensors",
    "nul": "model\0.safetensors",
    "backslash": "..\\x.safetensors",
    "drive": "C:\\x.safetensors",
    "folder": "m/x.safetensors",
    "hidden": ".safetensors",
    "dots": "a..safetensors/../x.safetensors",
    "line": "a\nb.safetensors",
    "escapes": "\x1b[2J.safetensors",
    "number": 5,
    "null": None,
    "list": ["x.safetensors"],
    "itself": INDEX,
    "pickle": "pytorch_model.bin",
    "long": "a" * 5000 + ".safetensors",
    "home": "~/x.safetensors",
}

INDEXES: dict[str, tuple[int, Callable[[dict[str, Any]], Any], str]] = {
    **{f"file-{n}": (14, pointing_to(f), "index-malformed") for n, f in _FILES.items()},
    "duplicate-key": (
        13,
        lambda i: b'{"weight_map":{"a":"model-00001-of-00002.safetensors","a":"x.safetensors"}}',
        "index-malformed",
    ),
    "no-map": (20, lambda i: {"metadata": {}}, "index-malformed"),
    "map-list": (20, lambda i: {"weight_map": []}, "index-malformed"),
    "map-empty": (20, lambda i: {"weight_map": {}}, "index-malformed"),
    "array": (20, lambda i: [], "index-malformed"),
    "empty": (20, lambda i: b"", "index-malformed"),
    "zeros": (20, lambda i: b"\0" * 100, "index-malformed"),
    "cut": (20, lambda i: json.dumps(i).encode()[:200], "index-malformed"),
    "not-utf8": (20, lambda i: b'{"weight_map":{"\xff":"x.safetensors"}}', "index-malformed"),
    "depth": (12, lambda i: b'{"weight_map":' + b"[" * 1_000_000, "index-malformed"),
    "ten-million-lists": (9, lambda i: b'{"weight_map":[' + b"[]," * 10_000_000 + b"[]]}", "index-malformed"),
    "phantom": (
        20,
        lambda i: i | {"weight_map": i["weight_map"] | {"x": "model-00001-of-00002.safetensors"}},
        "index-phantom",
    ),
    "swapped": (20, _swapped, "index-conflict"),
    "shard-not-there": (20, pointing_to("model-00009-of-00002.safetensors"), "weight-sets"),
}


def _unlisted(index: dict[str, Any]) -> Any:
    return index | {"weight_map": dict(list(index["weight_map"].items())[1:])}


def _lying_total(index: dict[str, Any]) -> Any:
    return index | {"metadata": {"total_size": -(10**30), "x": "\x1b[2J"}}


HARMLESS: dict[str, Callable[[dict[str, Any]], Any]] = {"unlisted": _unlisted, "total": _lying_total}


def _numbered(names: list[str], folder: Path) -> None:
    root = without_weights(folder)
    raw = (BASE / "model-00001-of-00002.safetensors").read_bytes()
    for name in names:
        (root / name).write_bytes(raw)


_SHARDS = {
    "of-99999": ["model-00001-of-99999.safetensors"],
    "of-999999": ["model-000001-of-999999.safetensors"],
    "two-sets": ["model-00001-of-00002.safetensors", "model-00002-of-00003.safetensors"],
    "zeroth": ["model-00000-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "same-tensors": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
}


def _huge_header(folder: Path) -> None:
    """A file of 300 MB, nearly all of it a hole, whose header is said to be most of it."""
    path = without_weights(folder) / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b"{")
        file.truncate(300_000_000)


CASES: list[Case] = [
    *(
        Case(
            f"header-{n}",
            row,
            partial(single, raw),
            ON_MODEL,
            "model.safetensors",
            "safetensors-|file-truncated|no-tensors|git-lfs",
        )
        for n, (row, raw) in HEADERS.items()
    ),
    Case("header-no-tensors", 20, partial(single, safetensors({})), ON_MODEL, says="no-tensors|tensors-lost"),
    Case("header-hole", 12, _huge_header, ON_MODEL, "model.safetensors", "safetensors-header"),
    *(
        Case(
            f"index-{n}",
            row,
            partial(indexed, change),
            ON_MODEL[::-1],  # and no `repair` in turn: it makes a new index of the headers, which are sound
            INDEX if n != "shard-not-there" else "model-00009",
            says,
        )
        for n, (row, change, says) in INDEXES.items()
    ),
    *(
        Case(
            f"index-{n}",
            20,
            partial(indexed, change),
            ("reshard m out", "inspect m"),
            exits={"inspect": (0, 1)},
            harmless=True,
        )
        for n, change in HARMLESS.items()
    ),
    *(
        Case(f"shards-{n}", 20, partial(_numbered, names), ON_MODEL, says="shard-missing|tensor-twice")
        for n, names in _SHARDS.items()
    ),
]
