"""`verify --json` of a folder that fails and that holds: one object, whose commands are text."""

from __future__ import annotations

import json
from pathlib import Path

from oracle.command import run
from verify_folders import make_rm


def test_a_folder_that_fails_is_told_as_one_object_whose_commands_are_text(tmp_path: Path) -> None:
    rm = make_rm(tmp_path / "rm")
    for arguments, code in (((rm, "--for", "trl"), 0), ((rm, "--for", "verl", "--role", "critic"), 4)):
        ran = run("verify", *arguments, "--json")
        assert ran.code == code, ran.text
        found = json.loads(ran.out)
        assert found["verified"] == (code == 0)
        assert found["next"]
        assert all(isinstance(each, str) for each in found["next"])
        assert all(isinstance(check.get("next", ""), str) for check in found["checks"])
        assert {check["outcome"] for check in found["checks"]} <= {"holds", "fails", "note"}
        if code == 4:
            assert any(each.startswith("rlhf-convert ") for each in found["next"])
