"""Recipes, training logs, receipts and model cards of strangers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hostile.cases import BASE, Case, Content, content_of, model

_HEAD = f"version: 1\ninputs:\n  source: {BASE}\n"
RECIPES: dict[str, str | bytes] = {
    "python-object": "!!python/object/apply:os.system ['touch canary']",
    "python-name": _HEAD + "steps: [{cast: {dtype: !!python/name:os.system }}]",
    "python-module": "version: !!python/module:planted_module 1",
    "binary-tag": "version: !!binary aGk=",
    "local-tag": "version: !planted 1",
    "aliases": "a: &a [x,x]\n"
    + "".join(f"{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "anchor": "version: &v 1",
    "merge-key": "version: 1\n<<: {steps: []}",
    "itself": "&a [*a]",
    "key-twice": _HEAD + "version: 1",
    "deep-flow": "steps: " + "[" * 100_000,
    "deep-block": "".join(" " * i + "a:\n" for i in range(400)),
    "two-megabytes": "# " + "x" * 2_000_000,
    "million-spaces": " " * 900_000 + "x",
    "long-scalar": "version: " + "1" * 900_000,
    "nine-hundred-thousand-steps": _HEAD + "steps: [" + "x," * 400_000 + "]",
    "many-keys": "{" + ",".join(f"a{i}: 1" for i in range(80_000)) + "}",
    "two-documents": _HEAD + "---\n" + _HEAD,
    "not-utf8": b"version: \xff",
    "utf16": "version: 1".encode("utf-16"),
    "nul": b"version: 1\0",
    "escapes": b"version: 1\n\x1b[2J: 1",
    "escaped-escapes": 'version: 1\n"\\e[2J": 1',
    "turned-around": "version: 1\n\u202ex: 1",
    "half-a-pair": 'version: 1\n"\\uD800": 1',
    "tab": "version:\t1\n\tinputs: x",
    "percent": "%YAML 9.9\n%TAG ! tag:x,2000:\n---\n!x y",
    "empty": "",
    "number": "5",
    "list": "[]",
    "version-huge": "version: 1e999",
    "version-hex": "version: 0x1",
    "unknown-key": _HEAD + "run: touch canary",
    "unknown-step": _HEAD + "steps: [{os.system: {command: touch canary}}]",
    "unknown-step-escapes": _HEAD + 'steps: [{"\\e[2J": {}}]',
    "step-list": _HEAD + "steps: [[cast]]",
    "step-two": _HEAD + "steps: [{cast: {dtype: bf16}, x: {}}]",
    "step-field": _HEAD + 'steps: [{cast: {"\\e[2J": 1}}]',
    "step-dunder": _HEAD + "steps: [{cast: {__class__: x}}]",
    "step-type": _HEAD + "steps: [{cast: {dtype: [bf16]}}]",
    "step-input": _HEAD + "steps: [{merge-lora: {adapters: [../../x]}}]",
    "input-name": "version: 1\ninputs: {../x: y}",
    "input-device": "version: 1\ninputs: {source: /dev/zero}",
    "input-pipe": "version: 1\ninputs: {source: pipe}",
    "input-address": "version: 1\ninputs: {source: 'http://127.0.0.1/x'}",
    "input-nul": 'version: 1\ninputs: {source: "a\\0b"}',
    "input-escapes": 'version: 1\ninputs: {source: "\\e[2J"}',
    "input-long": "version: 1\ninputs: {source: " + "x/" * 20_000 + "}",
    "input-revision": f"version: 1\ninputs: {{source: {{path: {BASE}, revision: ../../x}}}}",
    "base-of-itself": "version: 1\ninputs: {source: {base-of: source}}",
    "base-of-a-circle": "version: 1\ninputs: {source: {base-of: b}, b: {base-of: source}}",
    "base-of-nobody": "version: 1\ninputs: {source: {base-of: x}}",
    "no-inputs": "version: 1\ninputs: {}",
    "size-negative": _HEAD + "output: {max-shard-size: -5}",
    "size-zero": _HEAD + "output: {max-shard-size: 0}",
    "size-huge": _HEAD + "output: {max-shard-size: 1e400GB}",
    "size-long": _HEAD + "output: {max-shard-size: '" + "9" * 100_000 + "GB'}",
    "size-slow": _HEAD + "output: {max-shard-size: '" + "1" * 50_000 + "!'}",
    "layout": _HEAD + "output: {layout: '\\x1b[2J'}",
}


def recipe(content: str | bytes, folder: Path) -> None:
    """A recipe of a stranger."""
    os.mkfifo(folder / "pipe")
    (folder / "planted_module.py").write_text("import os; os.system('touch canary')")
    (folder / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())


_RECIPE_EXITS = {"run": (2, 3)}
_LOG = (
    b"RuntimeError: Error(s) in loading state_dict for X:\n size mismatch for score.weight: "
    b"copying a param with shape torch.Size([0])"
)
LOGS: dict[str, Content] = {
    "one-line": lambda: b"size mismatch for " + b"a" * 10_000_000,
    "no-newlines": lambda: b"x" * 30_000_000,
    "newlines": lambda: b"\n" * 3_000_000,
    "returns": lambda: b"\r" * 3_000_000,
    "escapes": b"\x1b[2J\x1b]0;x\x07" + _LOG.replace(b"score", b"\x1b[31mscore\x1b[0m") + b" \x9b2J\xc2\x9b2J\n",
    "open-escape": b"\x1b[" + b"0;" * 200_000 + b" size mismatch for x\n",
    "nul": b"\0" * 1_000_000 + _LOG,
    "not-utf8": bytes(range(256)) * 1000 + _LOG,
    "utf16": _LOG.decode().encode("utf-16"),
    "turned-around": _LOG.replace(b"score", "\u202e\u2066score".encode()),
    "half-a-pair": _LOG.replace(b"score", b"\xed\xa0\x80score"),
    "keys-repeated": b" ".join([b"size mismatch for", b"copying a param with shape torch.Size(["] * 20_000),
    "brackets": b"Some weights of the model were not initialized: [" * 5_000,
    "quotes": b"Some weights of " + b"'a', " * 100_000 + b"were not initialized from the model checkpoint\n",
    "spaces": b"size mismatch for score.weight:" + b" " * 500_000 + b"!\n",
    "digits": b"torch.Size([" + b"0, " * 300_000 + b"\n",
    "empty": b"",
    "pickle": b"\x80\x02cposix\nsystem\nX\x0c\0\0\0touch canary\x85R.",
}


def log(given: Content, folder: Path) -> None:
    """A training log."""
    (folder / "train.log").write_bytes(content_of(given))


RECEIPTS: dict[str, tuple[int, Any]] = {
    "traversal": (
        14,
        {"files": {"../../../../../../etc/passwd": {"size": 1, "sha256": "0"}, "../secret": {"sha256": "0"}}},
    ),
    "absolute": (
        14,
        {"files": {"/etc/passwd": {"sha256": "0"}, "/dev/zero": {"sha256": "0"}, "/proc/self/mem": {"sha256": "0"}}},
    ),
    "link-out": (15, {"files": {"link": {"sha256": "0"}}}),
    "pipe": (15, {"files": {"pipe": {"sha256": "0"}}}),
    "nul": (14, {"files": {"a\0b": {"sha256": "0"}}}),
    "long-name": (14, {"files": {"x" * 5000: {"sha256": "0"}, "x/" * 5000: 5}}),
    "escapes": (25, {"files": {"\x1b[2J": 5}, "version": "\x1b[2J", "recipe": {"steps": [{"\x1b[2J": {}}]}}),
    "half-a-pair": (
        25,
        {"files": {"\ud800": 5}, "version": "\ud800", "recipe": {"steps": [{"\ud800": {"x": "\ud800"}}]}},
    ),
    "sizes": (14, {"files": {"config.json": {"size": 10**400, "sha256": 5}}}),
    "not-an-object": (14, []),
    "fields-of-other-kinds": (
        14,
        {"files": [], "tensors": [], "counts": [], "recipe": [], "inputs": 5, "notes": {}, "dropped": []},
    ),
    "measures": (14, {"tensors": {"lm_head.weight": {"x": "\x1b[2J"}, "y": 5}, "counts": {"copied": 10**400}}),
    "measures-nan": (14, {"tensors": {"lm_head.weight": {"kept": float("nan"), "delta": 1e308, "update": -1}}}),
    "card": (
        24,
        {
            "version": "x\n---\nlicense: mit\n---\n<script>",
            "inputs": {"a": {"name": "x|y\n# z", "kind": "model", "revision": "`"}},
            "notes": [["changes-numbers", "x", "\n# evil\n<img src=x>"]],
            "dropped": {"<b>": "](http://x)"},
        },
    ),
    "card-steps": (24, {"recipe": {"steps": [{"```\n# evil": {"a": ["x"] * 100_000}}]}, "consents": {"a": "\n---\n"}}),
    "hub-name": (
        24,
        {"inputs": {"a": {"name": "me/x\nlicense: mit", "kind": "model"}, "b": {"name": "../..", "kind": "model"}}},
    ),
}


def receipt(content: Any, folder: Path) -> None:
    """A model with a receipt that somebody else wrote."""
    root = model(folder)
    (folder / "secret").write_text("x")
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("../secret")
    (root / "rlhf-convert.json").write_text(json.dumps(content))


CARDS: dict[str, bytes | Callable[[Path], object]] = {
    "aliases": b"---\na: &a [x,x]\nb: [*a,*a]\n---\n",
    "python": b"---\nlicense: !!python/object/apply:os.system ['touch canary']\n---\n",
    "deep": b"---\n" + b"[" * 100_000 + b"\n---\n",
    "list": b"---\n[1]\n---\n",
    "key-twice": b"---\nlicense: mit\nlicense: gpl\n---\n",
    "two-megabytes": b"---\nx: " + b"x" * 2_000_000 + b"\n---\n",
    "hundred-megabytes": lambda card: card.write_bytes(b"x" * 100_000_000),
}
CARDS_TAKEN: dict[str, bytes] = {
    "half-a-pair": b'---\nx: "\\uD800"\n---\n',
    "no-end": b"---\n" * 100_000,
    "dashes": b"---\n" + b"-" * 500_000,
    "spaces": b"---" + b" " * 500_000 + b"\n",
    "sections": b"<!-- rlhf-convert: begin -->" * 20_000,
    "not-utf8": b"\xff\xfe" * 100,
    "escapes": b"# \x1b[2J",
}


def card(make: bytes | Callable[[Path], object], folder: Path) -> None:
    """A model with a card of its own."""
    path = model(folder) / "README.md"
    if isinstance(make, bytes):
        path.write_bytes(make)
    else:
        make(path)


def _receipt_is(make: Callable[[Path], None], folder: Path) -> None:
    make(model(folder) / "rlhf-convert.json")


_PUSH = ("push m me/x --dry-run",)
_CHECKED = {"verify": (0, 3, 4), "push": (0, 3), "inspect": (0, 1), "reshard": (0, 3)}
CASES: list[Case] = [
    *(
        Case(
            f"recipe-{n}",
            17,
            partial(recipe, content),
            ("run r.yaml out",),
            says="r.yaml|path-missing|not-a-|input-|unknown-input|recipe|revision",
            exits=_RECIPE_EXITS,
        )
        for n, content in RECIPES.items()
    ),
    Case(
        "recipe-is-a-pipe",
        15,
        lambda f: os.mkfifo(f / "r.yaml"),
        ("run r.yaml out",),
        "r.yaml",
        "input-not-a-file",
        exits=_RECIPE_EXITS,
    ),
    Case(
        "recipe-is-a-folder",
        15,
        lambda f: (f / "r.yaml").mkdir(),
        ("run r.yaml out",),
        "r.yaml",
        "input-not-a-file",
        exits=_RECIPE_EXITS,
    ),
    Case(
        "recipe-is-a-device",
        15,
        lambda f: (f / "r.yaml").symlink_to("/dev/zero"),
        ("run r.yaml out",),
        "r.yaml",
        "input-not-a-file",
        exits=_RECIPE_EXITS,
    ),
    *(
        Case(f"log-{n}", 25, partial(log, content), ("explain train.log",), harmless=True)
        for n, content in LOGS.items()
    ),
    Case(
        "log-is-a-pipe",
        15,
        lambda f: os.mkfifo(f / "train.log"),
        ("explain train.log",),
        "train.log",
        "input-not-a-file",
    ),
    Case(
        "log-is-a-device",
        15,
        lambda f: (f / "train.log").symlink_to("/dev/zero"),
        ("explain train.log",),
        "train.log",
        "input-not-a-file",
    ),
    *(
        Case(
            f"receipt-{n}",
            row,
            partial(receipt, content),
            ("verify m --for openrlhf", *_PUSH, "inspect m", "reshard m out"),
            exits=_CHECKED,
            harmless=True,
        )
        for n, (row, content) in RECEIPTS.items()
    ),
    Case(
        "receipt-is-a-pipe",
        15,
        partial(_receipt_is, os.mkfifo),
        ("verify m --for openrlhf", *_PUSH),
        exits=_CHECKED,
        harmless=True,
    ),
    Case(
        "receipt-links-out",
        15,
        partial(_receipt_is, lambda p: p.symlink_to("/etc/passwd")),
        ("verify m --for openrlhf", *_PUSH),
        exits=_CHECKED,
        harmless=True,
    ),
    *(
        Case(f"card-{n}", 24, partial(card, raw), _PUSH, "README.md", "card-malformed|input-")
        for n, raw in CARDS.items()
    ),
    *(
        Case(f"card-{n}", 24, partial(card, raw), _PUSH, exits={"push": (0, 3)}, harmless=True)
        for n, raw in CARDS_TAKEN.items()
    ),
    Case("card-is-a-pipe", 15, partial(card, os.mkfifo), _PUSH, "README.md", "input-not-a-file"),
    Case(
        "card-links-out", 15, partial(card, lambda p: p.symlink_to("/etc/passwd")), _PUSH, "README.md", "input-outside"
    ),
]
