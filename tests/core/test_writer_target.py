"""The output: where it may be, what it may replace, its permissions, and what its receipt says."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from converter.core.files.opening import Identity
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.writer.plan import Plan
from converter.core.writer.stage import Stage
from converter.errors import Refused
from durability import Quiet, tree
from small_models import finish, half_cast, numbers, open_model, plan_of, save_model, written

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Three files, in each a tensor that is copied and one that is cast."""
    return half_cast(tmp_path)


# Replacing


def test_overwrite_replaces_an_output_of_ours(plan: Plan, tmp_path: Path) -> None:
    written(half_cast(tmp_path, layout="pack"), tmp_path / "out")
    with pytest.raises(Refused) as caught:
        written(plan, tmp_path / "out")
    assert (caught.value.code, "--overwrite" in str(caught.value.next)) == ("output-exists", True)
    finish(plan, tmp_path / "out", overwrite=True)


def test_overwrite_is_not_advised_where_it_would_be_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"")
    with pytest.raises(Refused) as caught:
        written(plan, tmp_path / "theirs")
    assert (caught.value.code, str(caught.value.next)) == ("output-exists", "choose another name")


def test_overwrite_replaces_an_empty_folder(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    finish(plan, tmp_path / "out", overwrite=True)


def test_overwrite_leaves_the_old_output_in_place_until_the_new_one_is_whole(plan: Plan, tmp_path: Path) -> None:
    written(half_cast(tmp_path, layout="pack"), tmp_path / "out")
    before = tree(tmp_path / "out")

    class Looking(Quiet):
        def checking(self, what: str) -> None:
            assert tree(tmp_path / "out") == before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(plan, tmp_path / "out", overwrite=True, reporter=Looking())
    assert tree(tmp_path / "out") == before
    finish(plan, tmp_path / "out", overwrite=True)


def refused(plan: Plan, out: Path, code: str, **options: Any) -> None:
    """Refused, and nothing is changed or added."""
    top = Path(next(iter(plan.inputs))).parent.parent
    before = tree(top)
    with pytest.raises(Refused) as caught:
        written(plan, out, **{"overwrite": True} | options)
    assert caught.value.code == code
    assert tree(top) == before


def test_a_folder_without_our_receipt_is_not_replaced(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    refused(plan, tmp_path / "out", "output-foreign")


def test_files_links_and_the_current_folder_are_not_replaced(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refused(plan, tmp_path / "file", "output-protected")
    written(plan, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refused(plan, tmp_path / "link", "output-protected")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(plan, tmp_path / "dangling", "output-protected")
    refused(plan, tmp_path / "dangling", "output-exists", overwrite=False)
    (tmp_path / "real" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "real" / "sub")
    for here in (tmp_path / "real" / "sub", tmp_path / "real", Path(".."), Path(), Path("/")):
        refused(plan, here, "output-protected")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "real" / "sub"))
    refused(plan, tmp_path / "real", "output-protected")


def test_a_strangers_folder_under_the_old_outputs_name_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    written(plan, tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis.tex").write_text("mine")
    refused(plan, tmp_path / "out", "stage-foreign")


@pytest.mark.parametrize("content", ["mine", "replaces everything", "replaces inode twelve\n"])
def test_a_strangers_file_under_the_markers_name_is_left_alone(plan: Plan, tmp_path: Path, content: str) -> None:
    written(plan, tmp_path / "out")
    (tmp_path / "out.replacing").write_text(content)
    (tmp_path / "out.old").mkdir()
    refused(plan, tmp_path / "out", "stage-foreign")


def test_a_marker_of_another_folder_does_not_cost_a_stranger_his(plan: Plan, tmp_path: Path) -> None:
    written(plan, tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis.tex").write_text("mine")
    (tmp_path / "out.replacing").write_text("replaces inode 1\n")
    with pytest.raises(Refused, match=r"out\.old is in the way"):
        written(plan, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.old" / "thesis.tex").read_text() == "mine"


def test_a_replacement_that_is_being_cleared_up_by_its_run_is_not_taken_over(plan: Plan, tmp_path: Path) -> None:
    written(plan, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "out.old")
    (tmp_path / "out.replacing").write_text(f"replaces inode {(tmp_path / 'out.old').stat().st_ino}\n")
    first = Stage(tmp_path / "first")
    first.open()
    (tmp_path / "first.partial").rename(tmp_path / "first")
    (tmp_path / "out").rename(tmp_path / "away")
    (tmp_path / "first").rename(tmp_path / "out")
    shutil.copy(tmp_path / "away" / "rlhf-convert.json", tmp_path / "out")
    refused(plan, tmp_path / "out", "output-busy")
    first.close()
    written(plan, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["away", "model", "out"]


# Inputs and output


def test_an_output_in_an_input_or_around_it_is_refused_also_through_links(plan: Plan, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (tmp_path / "link").symlink_to(model)
    for out in (model / "out", model / "deep" / "out", tmp_path / "link" / "out", model):
        refused(plan, out, "output-nests", overwrite=False)
    (model / "rlhf-convert.json").write_text("{}")
    linked = open_model(model).replace(inputs={str(tmp_path / "link" / SHARDS[0]): Identity(0, 0, 0)})
    for out in (model, model / "out", tmp_path):
        refused(plan_of(linked), out, "output-nests")


def test_a_disk_that_can_not_hold_the_output_is_refused_before_the_first_byte(plan: Plan, tmp_path: Path) -> None:
    vast = tensors.stored(TensorInfo(DType.U8, (10**18,)), str(tmp_path / "model" / SHARDS[0]), 0)
    with pytest.raises(Refused) as caught:
        written(plan_of(open_model(tmp_path / "model").replace(tensors={"x": vast})), tmp_path / "new" / "out")
    assert caught.value.code == "no-space"
    assert os.listdir(tmp_path) == ["model"]


def test_a_refusal_by_the_caller_leaves_nothing_not_even_folders_made_on_the_way(plan: Plan, tmp_path: Path) -> None:
    def refuse(measures: object) -> None:
        raise Refused("no-op", "nothing changed")

    refused(plan, tmp_path / "a" / "b" / "out", "no-op", overwrite=False, accept=refuse)
    assert os.listdir(tmp_path) == ["model"]


def test_missing_parent_folders_are_made(plan: Plan, tmp_path: Path) -> None:
    written(plan, tmp_path / "a" / "b" / "out")
    written(plan, tmp_path / "out")
    assert tree(tmp_path / "a" / "b" / "out") == tree(tmp_path / "out")
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_permissions_are_those_that_the_users_umask_gives(
    plan: Plan, tmp_path: Path, mask: int, folder: int, file: int
) -> None:
    before = os.umask(mask)
    try:
        written(plan, tmp_path / "new" / "out")
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").rglob("*")}
    assert {m for p, m in modes.items() if p.is_dir()} == {folder}
    assert {m for p, m in modes.items() if p.is_file()} == {file}


def test_inputs_are_never_written_to_also_where_they_are_read_only(plan: Plan, tmp_path: Path) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "model").iterdir()}
    for path in before:
        path.chmod(0o444)
    (tmp_path / "model").chmod(0o555)
    try:
        written(plan, tmp_path / "out")
    finally:
        (tmp_path / "model").chmod(0o755)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "model").iterdir()} == before


# The receipt


def test_the_receipt_is_the_same_in_any_folder_and_holds_no_path_and_no_time(tmp_path: Path) -> None:
    receipts = []
    for name in ("here", "a-long-way-off"):
        (tmp_path / name).mkdir()
        written(half_cast(tmp_path / name), tmp_path / name / "out", jobs=2)
        receipts.append((tmp_path / name / "out" / "rlhf-convert.json").read_bytes())
    assert receipts[0] == receipts[1]
    text = receipts[0].decode()
    assert str(tmp_path) not in text
    assert not re.search(r'"/|/tmp|20\d\d-|time|second|host', text)
    receipt = json.loads(text)
    assert receipt["counts"] == {"copied": 3, "computed": 3, "dropped": 0, "filled": 0}
    assert receipt["verified"] is True


def test_the_receipt_says_what_was_dropped_and_that_nothing_was_verified(tmp_path: Path) -> None:
    checkpoint = open_model(save_model(tmp_path / "model", {"a": numbers(3), "b": numbers(4)}))
    kept = checkpoint.replace(tensors={"a": checkpoint.tensors["a"]}, dropped={"b": "a reward model has none"})
    receipt = written(plan_of(kept), tmp_path / "out", verify=False)
    assert json.loads((tmp_path / "out" / "rlhf-convert.json").read_text()) == receipt.content
    assert receipt.content["dropped"] == {"b": "a reward model has none"}
    assert (receipt.content["verified"], receipt.reread, receipt.recomputed) == (False, 0, 0)
