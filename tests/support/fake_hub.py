"""A Hub on loopback for the real `huggingface_hub` client, standard library only: repositories, LFS, commits, ranges.

Routes and answers are those that the client of 2.4 asks for without xet (`HF_HUB_DISABLE_XET=1`). Faults are planned
with `Fault` and happen a given number of times. Content is kept by sha256, so that nothing is stored twice.

    python tests/support/fake_hub.py rlhf-convert demo --push me/demo

runs a command against such a Hub, without an account, and lists what it holds afterwards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fake_hub_answers import TOKEN, Answers
from fake_hub_state import Commit, Fault, Repo, Stored, due

__all__ = ["TOKEN", "Commit", "FakeHub", "Fault", "Repo", "Stored", "running"]

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model", ".zip")
LFS_SIZE = 10 << 20


class FakeHub(ThreadingHTTPServer):
    """The server; `url` is what HF_ENDPOINT is set to."""

    daemon_threads = True

    def __init__(self, *, multipart: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.sent_bytes = 0
        self.received_bytes = 0
        self.multipart = multipart
        self.may_write = True
        self.tokens = {TOKEN}
        self.xet: Path | None = None
        self.coming: dict[str, bytes] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.RLock()

    def by_chunks(self, folder: Path, contents: Iterable[bytes]) -> dict[str, str]:
        """Take large files as hf_xet sends them, into a folder that stands for the store of chunks.

        There is no way back from chunks to files here: what may be committed is told before, as `contents`.
        Returns the client's environment for that.
        """
        self.xet = folder
        self.coming = {hashlib.sha256(c).hexdigest(): c for c in contents}
        environment = self.environment()
        del environment["HF_HUB_DISABLE_XET"]
        return environment

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What the client needs in its environment."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def add(self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False) -> str:
        """Put files into a repository as a commit, and return its id."""
        repo = self.repos.setdefault(repo_id, self.new_repo(private))
        before = repo.branches["main"][-1].files
        made = {n: Stored(c, self.is_lfs(n, len(c))) for n, c in files.items()}
        self.blobs.update({s.sha256: s.content for s in made.values() if s.lfs})
        repo.objects.update(s.sha256 for s in made.values() if s.lfs)
        commit = Commit(self.new_oid(), before | made)
        repo.branches["main"].append(commit)
        return commit.oid

    def new_repo(self, private: bool) -> Repo:
        attributes = Stored(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        return Repo(
            private, branches={"main": [Commit(self.new_oid(), {".gitattributes": attributes}, "initial commit")]}
        )

    def new_oid(self) -> str:
        return hashlib.sha1(str(next(self.numbers)).encode(), usedforsecurity=False).hexdigest()

    def is_lfs(self, name: str, size: int) -> bool:
        return name.endswith(LFS_SUFFIXES) or size > LFS_SIZE

    def fault(self, request: str) -> Fault | None:
        """The fault that is due for this request, counted down."""
        with self.lock:
            return due(self.faults, request)

    def requests(self, pattern: str) -> list[str]:
        """The requests that came and match."""
        return [r for r in self.log if re.search(pattern, r)]


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve until the block ends."""
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Answer(Answers, BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

    def log_message(self, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        hub = self.server
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunked()
        else:
            self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        request = f"{self.command} {path}"
        with hub.lock:
            hub.log.append(request)
            hub.received_bytes += len(self.body)
        self.damage: str | None = None
        fault = hub.fault(request)
        if fault is not None:
            if fault.kind.isdigit():
                return self._send(int(fault.kind), b'{"error": "planned"}', retry_after="0")
            if fault.kind == "drop":
                return self._hang_up()
            if fault.kind == "gated":
                return self._send(403, b'{"error": "gated"}', X_Error_Code="GatedRepo")
            if fault.kind == "echo":  # a server whose errors quote what came
                said = {"error": f"bad request: {dict(self.headers)}"}
                return self._send(400, json.dumps(said).encode())
            if fault.kind == "spoilt" and self.body:
                self.body = bytes([self.body[0] ^ 1]) + self.body[1:]
            self.damage = fault.kind
        with hub.lock:
            status, value, headers = self.route(path)
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        if self.damage == "lost":
            return self._hang_up()
        return self._send(status, content, **headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _handle  # noqa: N815 - http.server's names

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        if self.damage == "corrupt" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_header("Content-Length", headers.pop("length", None) or str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            cut = content[: len(content) // 2] if self.damage == "short" else content
            self.wfile.write(cut)
            self.server.sent_bytes += len(cut)
            if self.damage == "short":
                self._hang_up()


def serve(command: Sequence[str]) -> int:
    """Run a command with a Hub of its own, and print what was published."""
    with running(FakeHub()) as hub:
        code = subprocess.run(command, env=os.environ | hub.environment(), check=False).returncode
        for name, repo in hub.repos.items():
            print(f"{name} on the fake Hub, {'private' if repo.private else 'public'}:")
            for path, file in repo.branches["main"][-1].files.items():
                print(f"  {len(file.content):>12}  {path}")
    return code


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
