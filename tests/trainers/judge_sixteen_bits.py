"""Merges the drawn adapters of `draw_sixteen_bits.py` and compares logits and tensors with what their PEFT made.

So does it with those of `draw_quantised.py`, whose bases are made whole.

python judge_sixteen_bits.py FOLDER     prints one line of JSON for each case
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from safetensors.torch import load_file

import judge_adapters as judging

import converter
from converter.errors import ConvertError

NOISE = 1e-4
"""A merge of PEFT in fp32 that is farther than this from its own live model is no truth for tensors."""
SLACK = 2e-6
"""Of a tensor's largest value: what two ways to compute a product in fp32 may differ by before it is rounded."""


def judge(home: Path) -> dict[str, Any]:
    """What came of one case: `right`, `refused`, `wrong` or `crashed`, with the reason."""
    case = json.loads((home / "case.json").read_text())
    live = load_file(home / "live.safetensors")
    about = ("peft", "transformers", "family", "kind", "task", "dtype", "adapter_dtype")
    found = {"number": home.name, **{k: case[k] for k in about}}
    theirs = {k: judging.distance(live[k], live["live"]) for k in ("loaded", "merged") if k in live}
    found |= theirs | ({"not_merged": case["not_merged"]} if "not_merged" in case else {})
    with tempfile.TemporaryDirectory() as scratch:
        dequantize = "quantised" in case
        found |= {"quantised": case["quantised"]} if dequantize else {}
        best = merge(home, Path(scratch) / "best", "best", dequantize=dequantize)
        if best is not None:
            return found | best
        try:
            found |= against_live(Path(scratch) / "best", home, live, theirs.get("merged", 1.0), case["dtype"])
        except Exception as error:
            return {**found, "is": "wrong", "why": f"does not load: {type(error).__name__}: {error}"[:300]}
        other = merge(home, Path(scratch) / "peft", "peft", dequantize=dequantize)
        if other is not None:
            return found | {"bits": other["is"], "bits_why": other["why"]}
        if (home / "peft").is_dir():
            found |= {"bits": bits(Path(scratch) / "peft", home / "peft")}
    return found


def merge(home: Path, out: Path, numerics: str, *, dequantize: bool) -> dict[str, Any] | None:
    """None where it is written."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            converter.merge_lora(home / "adapter", out, base=home / "base", numerics=numerics, dequantize=dequantize)
    except ConvertError as error:
        return {"is": "refused", "code": error.code, "why": str(error)[:400]}
    except Exception as error:
        return {"is": "crashed", "why": f"{type(error).__name__}: {error}"[:300]}
    return None


def against_live(out: Path, home: Path, live: dict[str, Any], noise: float, dtype: str) -> dict[str, Any]:
    """Logits no farther from the live model's than one rounding takes them, and tensors within one rounding."""
    model = loaded(out)
    distance = judging.distance(judging.say(model, live), live["live"])
    if noise > NOISE:
        return {"is": "right" if distance < 0.02 else "wrong", "distance": distance, "truth": "logits alone"}
    try:
        truth = loaded(home / "truth")
    except (ValueError, OSError):  # PEFT can't save replicated layers, and 0.13 saves wrappers of LN tuning
        return {"is": "right" if distance < 0.02 else "wrong", "distance": distance, "truth": "logits alone"}
    exact = truth.state_dict()
    far = [n for n, t in model.state_dict().items() if n in exact and not _is_near(t, exact[n], getattr(torch, dtype))]
    for value in truth.parameters():
        value.data = value.data.to(getattr(torch, dtype)).float()
    rounded = judging.distance(judging.say(truth, live), live["live"])
    made = {"distance": distance, "rounded": rounded}
    if far:
        return {"is": "wrong", "why": f"{len(far)} tensors are not the nearest: {far[:4]}", **made}
    return {"is": "right" if distance <= max(1e-4, 1.3 * rounded) else "wrong", **made}


def _is_near(ours: Any, exact: Any, dtype: Any) -> bool:
    """Whether a tensor is the exact one rounded to a dtype, where it is not between two numbers of it."""
    if ours.shape != exact.shape:
        return False
    size = exact.abs().max()
    return bool(((ours - exact).abs() <= (exact.to(dtype).float() - exact).abs() + SLACK * size).all())


def bits(ours: Path, theirs: Path) -> str:
    """`equal`, or which tensors are not, bit for bit, what PEFT's merge holds."""
    a, b = loaded(ours).state_dict(), loaded(theirs).state_dict()
    differ = {n: int((a[n] != b[n]).sum()) if a[n].shape == b[n].shape else -1 for n in a.keys() & b.keys()}
    wrong = {n: c for n, c in sorted(differ.items()) if c}
    return "equal" if not wrong else f"{len(wrong)} differ: {dict(list(wrong.items())[:3])}"


def loaded(folder: Path) -> Any:
    """The model of a folder in fp32, every tensor from its files.

    Raises:
        ValueError: a tensor is missing or left over.
    """
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        raise ValueError(str({k: v for k, v in info.items() if v}))
    return model.eval()


if __name__ == "__main__":
    sys.exit(judging.main(judge))
