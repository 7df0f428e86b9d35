"""Downloads from a hub on loopback, through the real client: only what is read, no token shown, errors in our words."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from converter.errors import ConvertError
from converter.sources.locate import resolve
from hub_here import client_of

FIRST = "a" * 40
HEADER = b"\x02\0\0\0\0\0\0\0{}"
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})


class Hub(ThreadingHTTPServer):
    """Answers what `snapshot_download` asks; `files` are those of the one repository, `owner/name`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = files
        self.sent: list[str] = []
        self.authorization: set[str | None] = set()


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.authorization.add(self.headers["Authorization"])
        path = self.path.partition("?")[0]
        files = self.server.files
        if path.startswith("/api/models/owner/name/revision/"):
            siblings = [{"rfilename": n} for n in files]
            self._answer(
                json.dumps({"id": "owner/name", "modelId": "owner/name", "sha": FIRST, "siblings": siblings}).encode()
            )
        elif path.startswith("/api/models/owner/name/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
            self._answer(json.dumps(entries).encode())
        elif path.startswith(f"/owner/name/resolve/{FIRST}/") and (name := path.split("/", 5)[5]) in files:
            if self.command == "GET":
                self.server.sent.append(name)
            self._answer(files[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", FIRST)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    names = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json")
    unwanted = ("pytorch_model.bin", "consolidated.safetensors", "optimizer.pt", "README.md", "onnx/model.onnx")
    files = {n: HEADER + n.encode() for n in (*names, *unwanted)} | {"model.safetensors.index.json": INDEX.encode()}
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


TOKEN = "hf_canaryTokenThatMustNeverBeShown"


def ask(hub: Hub, cache: Path, text: str = "owner/name") -> dict[str, Any]:
    """What `resolve` says where the client talks to `hub`; nothing that is printed holds the token."""
    printed = io.StringIO()
    with (
        client_of(hub, cache.parent),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            found = resolve(text, token=TOKEN)
            said = {"path": str(found.path), "repo_id": found.repo_id, "revision": found.revision}
        except ConvertError as error:
            said = error.to_json()
    assert TOKEN not in printed.getvalue() + json.dumps(said)
    return said


def test_a_model_is_downloaded_into_the_cache_and_only_what_is_read(hub: Hub, tmp_path: Path) -> None:
    found = ask(hub, tmp_path / "hub")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / FIRST
    assert found == {"path": str(snapshot), "repo_id": "owner/name", "revision": FIRST}
    wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert {p.name for p in snapshot.iterdir()} == wanted | set(re.findall(r"model-[\w-]+\.safetensors", INDEX))
    assert f"Bearer {TOKEN}" in hub.authorization
    sent = list(hub.sent)
    assert ask(hub, tmp_path / "hub") == found
    assert hub.sent == sent  # the cache serves the second call


def test_an_incomplete_snapshot_is_completed_where_there_is_a_network(hub: Hub, tmp_path: Path) -> None:
    found = ask(hub, tmp_path / "hub")
    gone = Path(found["path"]) / "model-00002-of-00002.safetensors"
    gone.resolve().unlink()
    gone.unlink()
    hub.sent.clear()
    assert ask(hub, tmp_path / "hub") == found
    assert hub.sent == [gone.name]
    assert gone.is_file()


def test_shards_of_other_names_are_downloaded_because_the_index_lists_them(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "consolidated.safetensors"}}'
    found = ask(hub, tmp_path / "hub")
    assert (Path(found["path"]) / "consolidated.safetensors").is_file()


def test_a_model_that_the_hub_does_not_have_is_told_in_our_words(hub: Hub, tmp_path: Path) -> None:
    error = ask(hub, tmp_path / "hub", "owner/nmae")
    assert (error["code"], error["exit_code"]) == ("hub-download", 3)
    assert "owner/nmae is not a folder here" in error["what"]
    assert "no such model" in error["what"]


def test_a_hub_that_can_not_be_reached_is_told_in_our_words(hub: Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    error = ask(hub, tmp_path / "hub")
    assert error["code"] == "hub-download"
    assert "can't be reached" in error["what"]
