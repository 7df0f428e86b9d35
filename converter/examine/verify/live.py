"""What the trainer itself makes of a folder: a probe runs its loader in its own Python, and the report is compared.

The probe's environment holds no tokens and no network is needed; what it loads, it loads on the CPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converter.converters.heads.model import Reading, main_dtype
from converter.core.checkpoint import Checkpoint
from converter.core.compute.evaluate import Evaluator, as_bytes
from converter.core.files.reading import InputFiles
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor, recast
from converter.dialects.known import Target, probe_of, probed
from converter.errors import ConvertError, Refused, UsageError
from converter.examine.verify.against import blocks
from converter.examine.verify.check import Check, fails, holds, note
from converter.examine.verify.values import (
    Batches,
    Reference,
    is_small,
    lazy_head,
    pooled,
    probe_batches,
    reading_inputs,
)
from converter.families.words import BUFFERS, OUTPUT_PREFIXES, input_embedding
from converter.text import fold, show

PROBES = Path(__file__).parent / "probes"
TIMEOUT = 600
"""Seconds that a probe may take; importing a trainer takes up to one minute on a slow disk."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
_NAMES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16, "float64": DType.F64}
NEAR = 2e-4
"""Largest difference between the trainer's fp32 values and ours in fp64, relative to the largest value."""


def check_live(
    root: Path, checkpoint: Checkpoint, reading: Reading | None, target: Target, python: str, *, allow: frozenset[str]
) -> list[Check]:
    """Run the trainer's loader and compare what it holds with the files; without a reading there is nothing to compare.

    Raises:
        UsageError: no such Python (`python-missing`), or no probe for this trainer (`live-unavailable`).
        Refused: the folder brings code that a trainer would run (`remote-code`), or the probe broke (`probe-failed`).
    """
    _refuse_code(root, allow)
    batches = probe_batches(checkpoint.config)
    report = run_probe(root, target, python, main_dtype(checkpoint), batches)
    versions = report["trainer"]
    words = ", ".join(f"{k} {v}" for k, v in versions.items() if k not in ("name", "class", "peft", "torch"))
    if "error" in report:
        error = report["error"]
        told = [s for s in report["said"] if "LOAD REPORT" in s or "mismatch" in s]
        text = f"{words} refuses it: {_tidy(' '.join([error['type'] + ':', error['text'], *told]), 900)}"
        return [fails("live", "live-refused", text)]
    if reading is None:
        loaded_as = show(versions.get("class"))
        text = f"{words} loads it as {loaded_as} with a head that is not in the folder; {_random(report)}"
        return [fails("live", "live-head", text)]
    checks = [_head(report, reading), *_backbone(report, reading)]
    checks += _numbers(report, reading, target, batches)
    if not any(c.outcome == "fails" for c in checks):
        checks.insert(0, holds("live", f"loaded by {words} as {show(versions.get('class'))}"))
    return [*checks, *_said(report)]


def run_probe(root: Path, target: Target, python: str, dtype: DType, batches: Batches) -> dict[str, Any]:
    """The probe's report."""
    probe = probe_script(target.serves.trainer)
    named = next((k for k, v in _NAMES.items() if v is dtype), "float32")
    with tempfile.TemporaryDirectory(prefix="rlhf-convert-probe-") as scratch:
        inputs, out = Path(scratch, "inputs.json"), Path(scratch, "out.json")
        inputs.write_text(json.dumps({"batches": {k: b.to_json() for k, b in batches.items()}}), encoding="utf-8")
        command = [os.path.expanduser(python), "-s", str(probe), str(root.resolve())]
        command += ["--role", target.role, "--inputs", str(inputs), "--out", str(out), "--dtype", named]
        try:
            done = subprocess.run(
                command, env=scrubbed(scratch), cwd=scratch, capture_output=True, timeout=TIMEOUT, check=False
            )
        except FileNotFoundError:
            raise UsageError("python-missing", "there is no such Python", where=show(python)) from None
        except subprocess.TimeoutExpired:
            raise Refused(
                "probe-failed", f"the trainer took more than {TIMEOUT} s to load it", where=show(python)
            ) from None
        if not out.is_file():
            said = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
            raise Refused(
                "probe-failed",
                f"the probe ended with exit code {done.returncode} and no report: {show(' | '.join(said), 500)}",
                where=show(python),
                next=f"check that {target.serves.trainer} can be imported there",
            )
        report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return report


def probe_script(trainer: str) -> Path:
    """The script that runs a trainer's own loader; it is found, and not imported.

    Raises:
        UsageError: the trainer has none, or the one that its dialect names is not there (`live-unavailable`).
    """
    named = probe_of(trainer)
    if not named:
        raise UsageError("live-unavailable", f"there is no probe for {trainer}", expected=", ".join(probed()))
    if named.endswith(".py"):
        return PROBES / named
    try:
        spec = importlib.util.find_spec(named)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise UsageError("live-unavailable", f"the probe for {trainer}, {show(named)}, is not installed")
    return Path(spec.origin)


def scrubbed(home: str) -> dict[str, str]:
    """An environment without tokens, proxies or a home folder that may hold them, and without GPUs."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {
        "HOME": home,
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _refuse_code(root: Path, allow: frozenset[str]) -> None:
    """Trainers pass `trust_remote_code=True`: code in the folder would run."""
    code = sorted(p.name for p in root.glob("*.py"))
    if code and "remote-code" not in allow:
        what = f"the folder brings code that the trainer would run: {fold(code)}"
        raise Refused("remote-code", what, where=show(root), consent=True)


# Tensors


def digest(tensor: LazyTensor, name: str, evaluator: Evaluator) -> str:
    """sha256 of a tensor's bytes in the dtype that the trainer loaded it in."""
    dtype = _NAMES.get(name)
    wanted = tensor if dtype is None else (recast(tensor, dtype) if tensor.info.dtype is not dtype else tensor)
    total = hashlib.sha256()
    for block in blocks(wanted):
        found: Any = evaluator.evaluate(block, {})
        total.update(as_bytes(found))
    return total.hexdigest()


def _head(report: Mapping[str, Any], reading: Reading) -> Check:
    """The head's tensors against the file's, by value."""
    assert reading.head is not None
    loaded = dict(report["head"])
    lost, rounded = [], []
    with InputFiles(reading_inputs(reading)) as files:
        evaluator = Evaluator(files)
        for tensor in lazy_head(reading.head):
            same = next((n for n, t in loaded.items() if digest(tensor, t["dtype"], evaluator) == t["sha256"]), None)
            if same is None:
                lost.append(f"{tensor.info.dtype.value} {list(tensor.info.shape)}")
            else:
                if _NAMES.get(loaded[same]["dtype"]) is not tensor.info.dtype:
                    rounded.append(same)
                del loaded[same]
    left = {n: t for n, t in loaded.items() if not n.startswith("normalizer.") and any(t.get("values", [1]))}
    if lost or left:
        which = ", ".join(lost) or fold(left)
        text = f"the head that was loaded is not the one in the folder ({which}): {_random(report)}"
        return fails("live", "live-head", text)
    if rounded:
        return note(
            "live", "live-rounded", f"the loader rounds {fold(rounded)} to {report['head'][rounded[0]]['dtype']}"
        )
    return holds("live", f"head equal: {fold(report['head'])}")


def _random(report: Mapping[str, Any]) -> str:
    told = [s for s in report["said"] if "newly initialized" in s or "MISSING" in s]
    return f"the loader said: {_tidy(told[0])}" if told else "the loader said nothing"


def _tidy(text: str, limit: int = 400) -> str:
    """A loader's words on one line, without colours."""
    return show(" ".join(_COLOUR.sub("", text).split()), limit)


def _backbone(report: Mapping[str, Any], reading: Reading) -> list[Check]:
    """Every tensor by its name below the family's prefix; what has other names there is paired by value."""
    prefix = reading.family.prefix or ""
    files = {n.removeprefix(prefix): t for n, t in reading.checkpoint.tensors.items()}
    loaded = {n.removeprefix(prefix): t for n, t in report["backbone"].items()}
    tied = input_embedding(files)
    wrong, random = [], []
    with InputFiles(reading_inputs(reading)) as opened:
        evaluator = Evaluator(opened)
        for name, found in loaded.items():
            source = files.get(name)
            if source is None and name.startswith(OUTPUT_PREFIXES) and reading.family.tied and tied is not None:
                source = files[tied]
            if source is None:
                random.append(name)
            elif digest(source, found["dtype"], evaluator) != found["sha256"]:
                wrong.append(name)
    absent = [n for n in files if n not in loaded and not n.startswith(OUTPUT_PREFIXES)]
    policy = [n for n in random if n.startswith(OUTPUT_PREFIXES)]
    random = [n for n in random if n not in policy and not n.endswith(BUFFERS)]
    checks = []
    if wrong:
        checks.append(
            fails("live", "live-backbone", f"{len(wrong)} tensors were loaded with other values: {fold(wrong)}")
        )
    if random or absent:
        text = f"not from the folder: {fold(random) or 'none'}; in the folder and not loaded: {fold(absent) or 'none'}"
        checks.append(fails("live", "live-backbone", text))
    if policy:
        checks.append(note("live", "lm-head-random", f"{fold(policy)} is random; values don't depend on it"))
    if not any(c.outcome == "fails" for c in checks):
        checks.insert(0, holds("live", f"{len(loaded) - len(policy)} backbone tensors equal"))
    return checks


# Values


def _numbers(report: Mapping[str, Any], reading: Reading, target: Target, batches: Batches) -> list[Check]:
    """Rewards or values against ours."""
    given = report.get("rewards") if target.role == "reward" else report.get("values")
    if not given:
        return [note("live", "not-run", f"the probe reports no {target.role}'s numbers")]
    if not is_small(reading):
        return [note("live", "not-run", "too large to compute here: only tensors are compared")]
    try:
        ours = Reference(dataclasses.replace(reading, normaliser=_applied(reading, target)))
    except ConvertError as error:
        return [note("live", error.code, f"values are not compared: {error.what}")]
    pad = reading.checkpoint.config.get("pad_token_id")
    largest, size, count = 0.0, 0.0, 0
    for name, batch in batches.items():
        expected = ours.values(batch)
        if target.role == "reward":
            rows = [
                (e, g)
                for e, g in zip(pooled(expected, batch, target.dialect.pooling, pad).tolist(), given[name], strict=True)
            ]
        else:
            columns = given[name]["columns"]
            rows = [
                (expected[i, c].item(), given[name]["rows"][i][k])
                for i, mask in enumerate(batch.attention_mask)
                for k, c in enumerate(columns)
                if mask[c]
            ]
        largest = max(largest, *(abs(a - b) for a, b in rows))
        size = max(size, *(abs(a) for a, _ in rows))
        count += len(rows)
    what = "rewards" if target.role == "reward" else "values"
    text = f"{count} {what} on right- and left-padded batches: {largest:.2g} from ours at most (largest {size:.3g})"
    if not largest <= NEAR * max(size, 1e-3):
        return [fails("live", "live-values", text)]
    return [holds("live", text)]


def _applied(reading: Reading, target: Target) -> Any:
    """The probes leave a trainer's normalisation off, but for safe-rlhf's, which its files switch on."""
    on = target.dialect.normaliser == "mean-var" and bool(reading.checkpoint.config.get("do_normalize"))
    return reading.normaliser if on else None


def _said(report: Mapping[str, Any]) -> list[Check]:
    """What the trainer's loader warned of, where it names weights."""
    told = [s for s in report["said"] if "not initialized from" in s or "newly initialized" in s or "LOAD REPORT" in s]
    return [note("live", "loader-said", _tidy(t)) for t in told[:2]]
