"""A Hub on loopback for the real `huggingface_hub` client, standard library only: repositories, LFS, commits, ranges.

Routes and answers are those that the client of 2.4 asks for without xet (`HF_HUB_DISABLE_XET=1`). Faults are planned
with `Fault` and happen a given number of times. Content is kept by sha256, so that nothing is stored twice.

    python tests/fake_hub.py rlhf-convert demo --push me/demo

runs a command against such a Hub, without an account, and lists what it holds afterwards.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fake_hub_state import Commit, Fault, Repo, Stored, entry_of

TOKEN = "hf_" + "fakeTokenForTests0" * 2
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
        self.numbers = itertools.count(1)
        self.lock = threading.RLock()

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
            for each in self.faults:
                if each.count and re.search(each.request, request):
                    if each.skip:
                        each.skip -= 1
                        return None
                    each.count -= 1
                    return each
        return None

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


class _Answer(BaseHTTPRequestHandler):
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
            self.damage = fault.kind
        with hub.lock:
            status, value, headers = self._route(path)
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

    # Routes. Each returns status, body and headers.

    def _route(self, path: str) -> tuple[int, Any, dict[str, str]]:
        hub = self.server
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/whoami-v2":
            role = "write" if hub.may_write else "read"
            me = {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}
            return (200, me, {}) if signed_in else _error(401, "")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(signed_in)
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})(?:/(\d+))?", path):
            return self._lfs_content(match[1], match[2])
        if path in ("/lfs-complete", "/lfs-verify"):
            return self._lfs_done(path)
        for pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                repo = hub.repos.get(match["repo"])
                if repo is None or (repo.private and not signed_in):
                    return _error(404 if signed_in else 401, "RepoNotFound")
                writes = answer in ("_commit", "_preupload", "_batch")
                if writes and not (signed_in and hub.may_write):
                    return _error(403 if signed_in else 401, "")
                result: tuple[int, Any, dict[str, str]] = getattr(self, answer)(repo, match)
                return result
        return _error(404, "EntryNotFound")

    def _create(self, signed_in: bool) -> tuple[int, Any, dict[str, str]]:
        value = json.loads(self.body)
        repo_id = f"{value.get('organization') or 'me'}/{value['name']}"
        if not signed_in or not self.server.may_write:
            return _error(403 if signed_in else 401, "")
        exists = repo_id in self.server.repos
        private = bool(value.get("private")) or value.get("visibility") == "private"
        self.server.repos.setdefault(repo_id, self.server.new_repo(private))
        body = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        return (409 if exists else 200), body, {}

    def _info(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        commit = repo.commit(match.groupdict().get("revision") or "main")
        if commit is None:
            return _error(404, "RevisionNotFound")
        siblings = [{"rfilename": n, "size": len(f.content)} for n, f in commit.files.items()]
        body = {"id": match["repo"], "modelId": match["repo"], "sha": commit.oid, "private": repo.private}
        return 200, body | {"siblings": siblings, "tags": []}, {}

    def _tree(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        commit = repo.commit(match["revision"])
        return (
            _error(404, "RevisionNotFound")
            if commit is None
            else (200, [entry_of(*f) for f in commit.files.items()], {})
        )

    def _paths(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        commit = repo.commit(match["revision"])
        if commit is None:
            return _error(404, "RevisionNotFound")
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        return 200, [entry_of(p, commit.files[p]) for p in paths if p in commit.files], {}

    def _preupload(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        commit = repo.commit(match["revision"])
        files = []
        for each in json.loads(self.body)["files"]:
            mode = "lfs" if self.server.is_lfs(each["path"], each["size"]) else "regular"
            here = commit.files.get(each["path"]) if commit else None
            oid = None if here is None else here.sha256 if here.lfs else here.blob_id
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def _batch(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for each in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in repo.objects:
                entry["actions"] = {
                    "upload": self._upload_action(match["repo"], each["oid"], each["size"]),
                    "verify": {"href": f"{self.server.url}/lfs-verify"},
                }
            objects.append(entry)
        transfer = "multipart" if self.server.multipart else "basic"
        return 200, {"transfer": transfer, "objects": objects}, {}

    def _upload_action(self, repo_id: str, oid: str, size: int) -> dict[str, Any]:
        url, chunk = f"{self.server.url}/lfs/{oid}", self.server.multipart
        if not chunk or size <= chunk:
            return {"href": f"{url}?repo={repo_id}"}
        urls = {f"{n:05d}": f"{url}/{n}" for n in range(1, -(-size // chunk) + 1)}
        whole = f"{self.server.url}/lfs-complete?repo={repo_id}"
        return {"href": whole, "header": {"chunk_size": str(chunk), **urls}}

    def _lfs_content(self, oid: str, part: str | None) -> tuple[int, Any, dict[str, str]]:
        if self.command != "PUT":
            return _error(405, "")
        if part is not None:
            self.server.parts.setdefault(oid, {})[int(part)] = self.body
            return 200, b"", {"ETag": hashlib.md5(self.body, usedforsecurity=False).hexdigest()}
        if hashlib.sha256(self.body).hexdigest() != oid:
            return _error(400, "")
        self._keep(oid, self.body)
        return 200, b"", {}

    def _keep(self, oid: str, content: bytes) -> None:
        self.server.blobs[oid] = content
        self.server.repos[self.query["repo"][0]].objects.add(oid)

    def _lfs_done(self, path: str) -> tuple[int, Any, dict[str, str]]:
        value = json.loads(self.body)
        oid = value["oid"]
        if path == "/lfs-complete":
            parts = self.server.parts.pop(oid, {})
            content = b"".join(parts[n] for n in sorted(parts))
            if hashlib.sha256(content).hexdigest() != oid:
                return _error(400, "")
            self._keep(oid, content)
        return (200, {}, {}) if oid in self.server.blobs else _error(404, "")

    def _commit(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = next(x["value"] for x in lines if x["key"] == "header")
        branch = match["revision"]
        commits = repo.branches.get(branch)
        if commits is None:
            return _error(404, "RevisionNotFound")
        parent = header.get("parentCommit")
        if parent is not None and parent != commits[-1].oid:
            return _error(412, "")
        files = dict(commits[-1].files)
        for each in lines:
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif each["key"] == "lfsFile":
                if value["oid"] not in repo.objects:
                    return _error(400, "")
                files[value["path"]] = Stored(self.server.blobs[value["oid"]], True)
            elif each["key"] == "deletedFile":
                files.pop(value["path"], None)
        made = Commit(self.server.new_oid(), files, header["summary"])
        if "create_pr" in self.query:
            name = f"refs/pr/{len(repo.branches)}"
            repo.branches[name] = [*commits, made]
            pull = f"{self.server.url}/{match['repo']}/discussions/{len(repo.branches) - 1}"
        else:
            commits.append(made)
            pull = None
        url = f"{self.server.url}/{match['repo']}/commit/{made.oid}"
        return 200, {"success": True, "commitOid": made.oid, "commitUrl": url, "pullRequestUrl": pull}, {}

    def _duplicate(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        value = json.loads(self.body)
        target = self.server.repos.get(value["target"]["name"])
        known = {f.sha256 for commits in repo.branches.values() for c in commits for f in c.files.values() if f.lfs}
        if target is None or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _error(404, "RepoNotFound")
        wanted = {f["sha256"] for f in value["files"]}
        target.objects |= wanted & known
        return 200, {"failed": [{"sha256": s, "error": "not here"} for s in sorted(wanted - known)]}, {}

    def _resolve(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        commit = repo.commit(match["revision"])
        file = None if commit is None else commit.files.get(match["path"])
        if commit is None or file is None:
            return _error(404, "EntryNotFound" if commit else "RevisionNotFound")
        etag = f'"{file.sha256 if file.lfs else file.blob_id}"'
        said = "f" * 40 if self.damage == "moved" else commit.oid
        headers = {"X-Repo-Commit": said, "ETag": etag, "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(file.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or self.damage == "whole":
            return 200, file.content, headers | ({"length": str(len(file.content))} if self.command == "HEAD" else {})
        start, last = int(wanted[1]), min(int(wanted[2] or len(file.content) - 1), len(file.content) - 1)
        if start >= len(file.content):
            return 416, b"", {}
        headers["Content-Range"] = f"bytes {start}-{last}/{len(file.content)}"
        return 206, file.content[start : last + 1], headers


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    (rf"/api/models/{_REPO}", "_info"),
    (rf"/api/models/{_REPO}/revision/(?P<revision>.+)", "_info"),
    (rf"/api/models/{_REPO}/tree/(?P<revision>[^?]+?)/?", "_tree"),
    (rf"/api/models/{_REPO}/paths-info/(?P<revision>.+)", "_paths"),
    (rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", "_preupload"),
    (rf"/api/models/{_REPO}/commit/(?P<revision>.+)", "_commit"),
    (rf"/api/models/{_REPO}/lfs-files/duplicate", "_duplicate"),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "_batch"),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve"),
)


def _error(status: int, code: str) -> tuple[int, Any, dict[str, str]]:
    return status, {"error": code or "refused"}, {"X-Error-Code": code} if code else {}


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
