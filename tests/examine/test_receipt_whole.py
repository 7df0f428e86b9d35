"""A receipt without what every receipt has was not written here, and verifies nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter.cli import main
from converter.core.files.names import RECEIPT
from converter.examine.verify.verify import VerifyRequest
from converter.examine.verify.verify import examine as verify
from healthy.models import Saved


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_receipt_that_lacks_a_key_of_every_receipt_fails(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Saved("causal", kind).write(tmp_path / "model")
    assert main(["reshard", str(source), str(tmp_path / "out"), "-q"]) == 0
    path = tmp_path / "out" / RECEIPT
    whole = json.loads(path.read_text())
    assert verify(VerifyRequest(str(tmp_path / "out"))).holds
    for key in ("version", "recipe", "inputs", "counts"):
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        failed = verify(VerifyRequest(str(tmp_path / "out"))).failed
        assert [(c.code, key in c.text) for c in failed] == [("receipt-broken", True)]
