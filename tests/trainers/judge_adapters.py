"""Merges drawn adapters and compares what the merged models say with what the live models of their PEFT said.

python judge_adapters.py FOLDER     prints one line of JSON for each case of `draw_adapters.py`
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from safetensors.torch import load_file

import converter
from converter.errors import ConvertError

NEAR, NOISE = 1e-4, 1e-3
"""How far logits may be from the live model's, all in fp32; where PEFT's own merge is farther, as far as that."""


def judge(home: Path) -> dict[str, Any]:
    """What came of one case: `right`, `refused`, `wrong` or `crashed`, with the reason."""
    with tempfile.TemporaryDirectory() as scratch:
        return _judged(home, Path(scratch) / "out")


def _judged(home: Path, out: Path) -> dict[str, Any]:
    case = json.loads((home / "case.json").read_text())
    live = load_file(home / "live.safetensors")
    found = {"number": home.name, **{k: case[k] for k in ("peft", "transformers", "family", "kind", "task")}}
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            converter.merge_lora(home / "adapter", out, base=home / "base")
    except ConvertError as error:
        return {**found, "is": "refused", "code": error.code, "why": str(error)[:400], **_theirs(live, case)}
    except Exception as error:
        return {**found, "is": "crashed", "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        said = _say(out, live)
    except Exception as error:
        return {**found, "is": "wrong", "why": f"does not load: {type(error).__name__}: {error}"[:300]}
    off = distance(said, live["live"])
    noise = distance(live["merged"], live["live"]) if "merged" in live else 0.0
    verdict = "right" if off < (NEAR if noise > NOISE else max(NEAR, noise)) else "wrong"
    moved = {"moved": distance(live["base"], live["live"])} if "base" in live else {}
    return {**found, "is": verdict, "distance": off, **moved, **_theirs(live, case), **_against(said, live)}


def _say(folder: Path, live: dict[str, Any]) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        raise ValueError(str({k: v for k, v in info.items() if v}))
    return say(model.eval(), live)


def say(model: Any, live: dict[str, Any]) -> Any:
    """A model's logits for a case's inputs."""
    inputs = {k.removeprefix("input."): v for k, v in live.items() if k.startswith("input.")}
    with torch.no_grad():
        return model(**inputs).logits


def _theirs(live: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """How far that PEFT's own reload, and its merge, are from its live model."""
    made = {k: distance(live[k], live["live"]) for k in ("loaded", "merged") if k in live}
    return made | ({"not_merged": case["not_merged"]} if "not_merged" in case else {})


def _against(said: Any, live: dict[str, Any]) -> dict[str, Any]:
    return {f"to_{k}": distance(said, live[k]) for k in ("loaded", "merged") if k in live}


def distance(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of `b`; of other shapes, infinite."""
    if a.shape != b.shape:
        return float("inf")
    return round(float((a.double() - b.double()).norm() / b.double().norm()), 7)


def main(judge: Callable[[Path], dict[str, Any]] = judge) -> int:
    """Judge every case of a folder; 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bad = 0
    for path in sorted(asked.folder.glob("*/case.json")):
        found = judge(path.parent)
        bad += found["is"] in ("wrong", "crashed")
        print(json.dumps(found), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
