"""Input files: only regular ones, only inside the folder asked for; JSON from strangers is read strictly."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from converter.core.files.opening import Identity, identity, open_input, read_exact, read_limited
from converter.core.files.strict_json import is_deeper, load_json, parse_json
from converter.errors import Refused
from strategies import json_values

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(path: Path, root: Path | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        os.close(open_input(path, root=root))
    assert path.name in str(caught.value)
    return caught.value


def content(path: Path, root: Path) -> bytes:
    return read_limited(path, limit=1000, root=root)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    return folder


# What may be opened


def test_a_regular_file_is_opened(model: Path) -> None:
    assert content(model / "file", model) == b"inside"


def test_a_missing_file_is_refused_by_name(model: Path) -> None:
    assert refused(model / "nothing", model).code == "input-missing"


def test_a_file_below_a_file_is_missing(model: Path) -> None:
    assert refused(model / "file" / "below", model).code == "input-missing"


def test_a_link_that_leads_nowhere_is_told_as_one(model: Path) -> None:
    (model / "link").symlink_to("nothing")
    assert "symbolic link that leads nowhere" in str(refused(model / "link", model))


def test_a_folder_is_no_file(model: Path) -> None:
    (model / "folder").mkdir()
    error = refused(model / "folder", model)
    assert (error.code, "a folder" in str(error)) == ("input-not-a-file", True)


def test_a_pipe_is_refused_without_waiting_for_a_writer(model: Path) -> None:
    os.mkfifo(model / "pipe")
    error = refused(model / "pipe", model)
    assert (error.code, "a pipe" in str(error)) == ("input-not-a-file", True)


def test_a_socket_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)  # the name of a socket may have 107 bytes only
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert refused(model / "socket", model).code == "input-not-a-file"


def test_a_device_is_refused() -> None:
    assert refused(Path("/dev/null")).code == "input-not-a-file"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(model: Path) -> None:
    (model / "file").chmod(0)
    assert refused(model / "file", model).code == "input-unreadable"


def test_links_in_a_circle_are_refused(model: Path) -> None:
    (model / "a").symlink_to("b")
    (model / "b").symlink_to("a")
    assert refused(model / "a", model).code == "input-outside"
    assert refused(model / "a").code == "input-outside"


# Links


def test_a_link_inside_the_folder_is_followed(model: Path) -> None:
    (model / "link").symlink_to("file")
    assert content(model / "link", model) == b"inside"


@pytest.mark.parametrize("target", ["../secret", "{tmp}/secret", "/etc/passwd", "/dev/zero"])
def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path, target: str) -> None:
    (model / "link").symlink_to(target.format(tmp=tmp_path))
    assert refused(model / "link", model).code == "input-outside"


def test_a_link_out_through_a_linked_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "up").symlink_to(tmp_path)
    assert refused(model / "up" / "secret", model).code == "input-outside"


def test_a_folder_beside_that_begins_with_the_same_name_is_outside(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model-2").mkdir()
    (tmp_path / "model-2" / "file").write_bytes(b"other")
    (model / "link").symlink_to("../model-2/file")
    assert refused(model / "link", model).code == "input-outside"


def test_a_folder_that_is_itself_a_link_is_entered(model: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("model")
    assert content(tmp_path / "latest" / "file", tmp_path / "latest") == b"inside"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A Hub cache: the file in the snapshot is a link to a blob, and that one to a blob that repositories share."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "models--owner--name" / "blobs").mkdir()
    (cache / "blobs" / "ab").mkdir(parents=True)
    (cache / "models--owner--name" / "blobs" / "etag").write_bytes(b"blob")
    (cache / "blobs" / "ab" / "hash").write_bytes(b"shared blob")
    (cache / "models--owner--name" / "blobs" / "shared").symlink_to("../../blobs/ab/hash")
    (snapshot / "file").symlink_to("../../blobs/etag")
    (snapshot / "shared").symlink_to("../../blobs/shared")
    return snapshot


def test_a_snapshots_link_to_its_repositorys_blob_is_followed(snapshot: Path) -> None:
    assert content(snapshot / "file", snapshot) == b"blob"


def test_a_snapshots_link_to_a_shared_blob_is_followed(snapshot: Path) -> None:
    assert content(snapshot / "shared", snapshot) == b"shared blob"


def test_a_folder_inside_a_snapshot_may_link_to_blobs_too(snapshot: Path) -> None:
    (snapshot / "adapter").mkdir()
    (snapshot / "adapter" / "file").symlink_to("../../../blobs/etag")
    assert content(snapshot / "adapter" / "file", snapshot / "adapter") == b"blob"


def test_a_cache_that_lies_behind_a_link_is_read(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to("hub")
    there = tmp_path / "elsewhere" / "models--owner--name" / "snapshots" / COMMIT
    assert content(there / "file", there) == b"blob"


@pytest.mark.parametrize("target", ["../../../models--other--one/blobs/etag", "../../refs/main", "../other/file"])
def test_a_snapshots_link_to_anything_else_is_refused(snapshot: Path, target: str) -> None:
    goal = snapshot / target
    goal.parent.mkdir(parents=True, exist_ok=True)
    goal.write_bytes(b"x")
    (snapshot / "link").symlink_to(target)
    assert refused(snapshot / "link", snapshot).code == "input-outside"


def test_a_folder_that_only_looks_like_a_snapshot_may_not_reach_its_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "mine" / "blobs").mkdir()
    (tmp_path / "mine" / "blobs" / "file").write_bytes(b"x")
    (folder / "link").symlink_to("../../blobs/file")
    assert refused(folder / "link", folder).code == "input-outside"


# Reading


def test_reading_past_the_end_is_refused_with_both_sizes(model: Path) -> None:
    fd = open_input(model / "file")
    try:
        assert read_exact(fd, 2, 3, file="file") == b"sid"
        assert read_exact(fd, 6, 0, file="file") == b""
        with pytest.raises(Refused, match="at least 9 bytes") as caught:
            read_exact(fd, 4, 5, file="file")
    finally:
        os.close(fd)
    assert caught.value.code == "input-cut"
    assert caught.value.got == "6 bytes"


def test_a_file_larger_than_its_limit_is_refused(model: Path) -> None:
    with pytest.raises(Refused, match="at most 5 bytes"):
        read_limited(model / "file", limit=5)


def test_identity_changes_with_size_time_and_inode(model: Path) -> None:
    file = model / "file"
    first = identity(file)
    assert Identity.from_json(json.loads(json.dumps(first.to_json()))) == first
    os.utime(file, ns=(0, first.mtime_ns + 1))
    second = identity(file)
    file.write_bytes(b"longer than before")
    os.utime(file, ns=(0, second.mtime_ns))
    third = identity(file)
    (model / "new").write_bytes(b"longer than before")
    os.utime(model / "new", ns=(0, second.mtime_ns))
    (model / "new").replace(file)
    assert len({first, second, third, identity(file)}) == 4


# JSON

MALFORMED = {
    "empty": (b"", "empty"),
    "zeros": (b"\0" * 64, "zeros"),
    "cut": (b'{"a": 1', "delimiter"),
    "trailing-comma": (b'{"a": 1,}', "line 1 column"),
    "single-quotes": (b"{'a': 1}", "property name"),
    "comment": (b'{"a": 1} // note', "Extra data"),
    "two-values": (b"{}{}", "Extra data"),
    "key-twice": (b'{"a": 1, "a": 2}', "`a` appears twice"),
    "key-twice-escaped": (rb'{"a": 1, "\u0061": 2}', "`a` appears twice"),
    "key-twice-deep": (b'{"x": [{"b": 1, "c": 2, "b": 1}]}', "`b` appears twice"),
    "byte-order-mark": (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "byte order mark"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 (byte 7)"),
    "nan": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "Infinity"),
    "deep-list": (b"[" * 65 + b"]" * 65, "deeper than 64"),
    "deep-object": (b'{"a":' * 65 + b"1" + b"}" * 65, "deeper than 64"),
    "bomb": (b"[" * 200_000, ""),
    "closed-bomb": (b"[" * 200_000 + b"]" * 200_000, "deeper than 64"),
    "long-number": (b"[" + b"9" * 5000 + b"]", "4300"),
    "control-character": (b'{"a": "x\ny"}', "control character"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00", "not UTF-8"),
    "html": (b"<!DOCTYPE html><html></html>", "Expecting value"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_json_is_refused_with_the_files_name(name: str, tmp_path: Path) -> None:
    raw, words = MALFORMED[name]
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(Refused) as caught:
        load_json(tmp_path / "config.json")
    assert caught.value.code == "json-malformed"
    assert "config.json" in (caught.value.where or "")
    assert words in caught.value.what


def test_control_characters_of_a_key_do_not_reach_the_message() -> None:
    with pytest.raises(Refused) as caught:
        parse_json(rb'{"\u001b[2J": 1, "\u001b[2J": 1}', where="config.json")
    assert "\x1b" not in str(caught.value)


def test_nan_and_infinity_are_read_where_they_are_expected() -> None:
    assert parse_json(b'{"time_step_limit": [0.0, Infinity]}', where="config.json", allow_nan=True) == {
        "time_step_limit": [0.0, float("inf")]
    }


def test_sixty_four_levels_are_not_too_deep() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, where="x")


def test_brackets_in_strings_do_not_count_as_levels() -> None:
    assert parse_json(json.dumps(["[" * 100, '"\\' * 9 + "{" * 100]).encode(), where="x")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max((_depth(v) for v in inner), default=0)


@settings(deadline=None)
@given(json_values)
def test_json_reads_as_pythons_own_parser_reads_it(value: Any) -> None:
    raw = json.dumps(value).encode()
    assert parse_json(raw, where="x") == value
    depth = _depth(value)
    assert not is_deeper(raw, depth)
    assert depth == 0 or is_deeper(raw, depth - 1)
