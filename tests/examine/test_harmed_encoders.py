"""A classifier of an encoder with one tensor lost or renamed: doctor and verify name the tensor, and no other cause."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.examine.doctor import DoctorRequest, examine
from converter.examine.verify.verify import VerifyRequest
from converter.examine.verify.verify import examine as verify
from healthy.models import Saved
from oracle.bases import read_tensors, write_tensors

HEADS = {
    "bert": "classifier.weight",
    "roberta": "classifier.dense.weight",
    "deberta-v2": "pooler.dense.weight",
    "t5": "classification_head.out_proj.weight",
}


@pytest.mark.parametrize("renamed", ["", "net."])
@pytest.mark.parametrize("kind", HEADS)
def test_a_lost_tensor_of_the_head_is_named_by_doctor_and_verify(kind: str, renamed: str, tmp_path: Path) -> None:
    name = HEADS[kind]
    folder = Saved("seqcls", kind).write(tmp_path / kind)
    tensors = read_tensors(folder)
    value = tensors.pop(name)
    write_tensors(folder, tensors | ({f"{renamed}{name}": value} if renamed else {}))
    found = {f.code: f.text for f in examine(DoctorRequest(str(folder))).findings if f.severity == "error"}
    assert name in found["tensors-missing"]
    assert set(found) == {"tensors-missing", *(["tensors-unexpected"] if renamed else [])}
    checks = [c for c in verify(VerifyRequest(str(folder))).checks if c.outcome == "fails"]
    assert any(c.code == "backbone-missing" and name in c.text for c in checks)
