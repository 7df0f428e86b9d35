"""One cell judged: what the source's and the target's own loaders hold and compute, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cells import BIAS, MEAN, NEAR, STD, Cell, Source, Target, inputs


def judge(
    source: Source, target: Target, own: Mapping[str, Any], found: Mapping[str, Any], folder: Path, refused: str
) -> Cell:
    """One cell, from the two loaders' reports."""
    first = next(iter(own.values()))
    for name, report in (("source", first), ("target", found)):
        if not report or "error" in report:
            return Cell("wrong", refused, f"{name}: {report.get('error', 'no report')}")
    if wrong := _backbone(first["backbone"], found["backbone"]):
        return Cell("wrong", refused, wrong)
    stays = source.mean and source.maker == "openrlhf" and target.leaves_mean
    keeps = stays or (source.mean and target.keeps_mean)
    if wrong := _head(source, target, found["head"], folded=source.mean and not keeps):
        return Cell("wrong", refused, wrong)
    # A trainer's own normalisation is off in the probes of OpenRLHF, and on in safe-rlhf's, whose files say so.
    scale = source.mean and source.maker == "openrlhf"
    unscaled = keeps and target.probe == "openrlhf"
    if unscaled and (wrong := _mean_and_std(folder, found["facts"]["buffers"], loaded=not stays)):
        return Cell("wrong", refused, wrong)
    pairs = list(_pairs(source, target, own, found))
    differences = []
    for theirs, ours in pairs:
        value = (theirs - MEAN) / STD if scale else theirs
        differences.append((ours - MEAN) / STD - value if unscaled else ours - value)
    if not differences:
        return Cell("wrong", refused, "nothing to compare")
    centre = sum(differences) / len(differences)
    width = max(abs(d - centre) for d in differences)
    detail = f"{len(differences)} numbers, {max(map(abs, differences)):.1e} at most"
    if max(map(abs, differences)) <= NEAR:
        return Cell("kept" if stays else "lossless", refused, detail)
    if width <= NEAR and abs(centre + source.constant) <= NEAR:
        return Cell("shift", refused, f"{centre:+.6f}")
    return Cell("wrong", refused, f"{detail}; shift {centre:+.4f}, rest {width:.1e}, constant {source.constant:+.4f}")


def _mean_and_std(folder: Path, buffers: Mapping[str, Any], *, loaded: bool) -> str:
    """They are in config.json, and, where the loader keeps them, in its buffers."""
    config = json.loads((folder / "config.json").read_text())
    if (config.get("mean"), config.get("std")) != (MEAN, STD):
        return f"config.json says mean {config.get('mean')} and std {config.get('std')}"
    has_them = (buffers["mean"], buffers["std"]) == ([MEAN], [STD])
    return "" if has_them == loaded else f"the loader holds mean {buffers['mean']} and std {buffers['std']}"


def _backbone(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Digests of every backbone tensor; an output embedding that only one side has is not part of it."""
    a, b = ({n.removeprefix("model."): t["sha256"] for n, t in side.items()} for side in (theirs, ours))
    names = {n for n in a.keys() | b.keys() if n != "lm_head.weight" or (n in a and n in b)}
    wrong = sorted(n for n in names if a.get(n) != b.get(n))
    return f"backbone differs: {', '.join(wrong[:4])}" if wrong else ""


def _head(source: Source, target: Target, head: Mapping[str, Any], *, folded: bool) -> str:
    """The weight bit by bit, or divided by a power of two; the bias what it was, or zero."""
    weight = next(t for n, t in head.items() if n.endswith("weight"))
    bias = next((t for n, t in head.items() if n.endswith("bias")), None)
    wanted = [((37 * i) % 101 - 50) / 64 / (STD if folded else 1) for i in range(32)]
    if weight["values"] != wanted:
        return "head.weight differs"
    constant = (BIAS if source.bias else 0.0) if not folded else source.constant
    if target.bias and bias is not None and abs(bias["values"][0] - constant) > 1e-7:
        return f"head.bias is {bias['values'][0]}, not {constant}"
    if target.bias and bias is None and constant:
        return "head.bias is missing"
    return ""


def _pairs(source: Source, target: Target, own: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    """Numbers of the source's loader beside those of the target's, at attended positions of both batches."""
    for side, batch in inputs()["batches"].items():
        mask = batch["attention_mask"]
        if target.role == "critic":
            a, b = own["critic"]["values"][side], found["values"][side]
            shared = [c for c in a["columns"] if c in b["columns"]]
            for row, on in enumerate(mask):
                for c in shared:
                    if on[c]:
                        yield a["rows"][row][a["columns"].index(c)], b["rows"][row][b["columns"].index(c)]
        elif "reward" in own:
            yield from zip(own["reward"]["rewards"][side], found["rewards"][side], strict=True)
        else:
            values = own["critic"]["values"][side]
            for row, on in enumerate(mask):
                last = max(i for i, k in enumerate(on) if k)
                if last in values["columns"]:
                    yield values["rows"][row][values["columns"].index(last)], found["rewards"][side][row]
