"""`verify --probe --report`: the page says of pairs what verify's own output says, flips and calibration included."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch

from converter.shipped import shipped
from verify_folders import copy, make_rm, rewrite, verify

TOKENIZER = shipped("fixtures") / "tiny-qwen2-base"
WORDS = ("Four", "Blue & <b>green</b>", "Yes, it is wet", "no", "I would rather not say", "seven and one")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A reward model, the same with its head's sign turned, and pairs."""
    root = tmp_path_factory.mktemp("probe")
    source = make_rm(root / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, source)
    turned = copy(source, root / "turned")

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        tensors["score.weight"] = -tensors["score.weight"]

    rewrite(turned, turn)
    pairs = [
        {"prompt": f"Question {i} <script>", "chosen": a, "rejected": WORDS[(i + 1) % len(WORDS)]}
        for i, a in enumerate(WORDS)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return source, turned, root / "pairs.jsonl"


def test_the_page_has_the_scores_the_flips_and_the_calibration(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, turned, pairs = folders
    report = tmp_path / "probe.html"
    options = ("--for", "trl", "--role", "reward", "--probe", str(pairs), "--against", str(source))
    _, found = verify(capsys, str(turned), *options, "--report", str(report))
    text = report.read_text()
    rows = found["pairs"]
    assert len(rows) == len(WORDS)
    before = [r["source_chosen"] - r["source_rejected"] for r in rows]
    here = [r["chosen"] - r["rejected"] for r in rows]
    flipped = [r for r, a, b in zip(rows, before, here, strict=True) if (a > 0) != (b > 0)]
    assert len(flipped) == len(rows), "the head's sign turns every margin"
    said = unescape(text)
    assert f"{len(flipped)} of {len(rows)} pairs changed order" in said
    for row, a, b in zip(rows, before, here, strict=True):
        assert f"{a:.4g}" in said
        assert f"{b:.4g}" in said
        assert row["prompt"] in said
    right = sum(m > 0 for m in here)
    assert f"Margins of {len(rows)} pairs, chosen less rejected; {right} are above 0" in said
    assert "Calibration in " in said
    assert "<script>" not in text
    assert text.count("<img") >= 3


def test_without_a_source_the_page_has_margins_alone(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _, pairs = folders
    report = tmp_path / "alone.html"
    code, found = verify(
        capsys, str(source), "--for", "trl", "--role", "reward", "--probe", str(pairs), "--report", str(report)
    )
    assert code == 0
    text = unescape(report.read_text())
    right = sum(r["chosen"] > r["rejected"] for r in found["pairs"])
    assert f"Margins of {len(WORDS)} pairs, chosen less rejected; {right} are above 0" in text
    assert "changed order" not in text
    assert "Scores here against" not in text
