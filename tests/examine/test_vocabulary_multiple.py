"""DeepSpeed-Chat resizes embeddings to a multiple of 8: verify and rm-to-critic agree on which folders do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from all_families import DECODERS, small
from converter.cli import main

KINDS = pytest.mark.parametrize("kind", DECODERS)


def as_dschat(folder: Path, kind: str, rows: int) -> Path:
    """A critic as DeepSpeed-Chat saves it: `rwtransformer.` before AutoModel's names, and `v_head`."""
    backbone = small("bare", kind, vocab_size=rows)
    state = {f"rwtransformer.{n}": t for n, t in backbone.state_dict().items()}
    width = backbone.get_input_embeddings().weight.shape[1]
    state["v_head.weight"] = torch.randn(1, width)
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    backbone.config.save_pretrained(folder)
    return folder


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    main(["verify", str(folder), "--for", "deepspeed-chat", "--role", "critic", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {c["code"] for c in found["checks"] if c["outcome"] == "fails"}


@KINDS
def test_verify_refuses_33_rows_and_not_40(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "vocabulary" in verify(as_dschat(tmp_path / "odd", kind, 33), capsys)
    assert "vocabulary" not in verify(as_dschat(tmp_path / "even", kind, 40), capsys)


@KINDS
def test_rm_to_critic_refuses_33_rows_and_not_40(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rows, refused in ((33, True), (40, False)):
        rm = as_dschat(tmp_path / f"rm{rows}", kind, rows)
        command = ["rm-to-critic", str(rm), str(tmp_path / f"critic{rows}"), "--to", "deepspeed-chat", "-q"]
        code = main([*command, "--from", "deepspeed-chat"])
        said = capsys.readouterr().err
        assert (code == 3 and "vocab-not-padded" in said) is refused, said
