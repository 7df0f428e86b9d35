"""The receipt counts what was written: a tensor that came later is told as one that is gone is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converter.cli import main
from verify_folders import WEIGHT, codes, make_rm, rewrite, verify


@pytest.mark.parametrize("change", ["one more", "one less", "none"])
def test_a_folder_with_other_tensors_than_the_receipt_counts_fails(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rm, out = make_rm(tmp_path / "rm"), tmp_path / "critic"
    assert main(["convert", str(rm), str(out), "--to", "verl", "--role", "critic", "-q"]) == 0
    if change == "one more":
        rewrite(out, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    elif change == "one less":
        rewrite(out, lambda t: t.pop(WEIGHT))
    capsys.readouterr()
    assert ("receipt-differs" in codes(verify(capsys, str(out), "--for", "verl")[1])) == (change != "none")
