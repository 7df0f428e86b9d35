"""What the Hub on loopback answers: one method a route, each returns status, body and headers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from fake_hub_state import Commit, Repo, Stored, entry_of

if TYPE_CHECKING:
    from fake_hub import FakeHub

TOKEN = "hf_" + "fakeTokenForTests0" * 2


class Answers:
    """The routes, for a handler of http.server, which brings the attributes."""

    server: FakeHub
    command: str
    headers: Message
    body: bytes
    query: dict[str, list[str]]
    damage: str | None

    def _is_known(self) -> bool:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") in self.server.tokens

    def route(self, path: str) -> tuple[int, Any, dict[str, str]]:
        hub = self.server
        signed_in = self._is_known()
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
        of_data = "datasets/" if path.startswith(("/api/datasets/", "/datasets/")) else ""
        if of_data:
            path = path.replace("/api/datasets/", "/api/models/", 1) if path.startswith("/api") else path[9:]
        for pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                repo = hub.repos.get(of_data + match["repo"])
                if repo is None or (repo.private and not signed_in):
                    return _error(404 if signed_in else 401, "RepoNotFound")
                writes = answer in ("_commit", "_preupload", "_batch", "_may_write", "_branch", "_xet_token")
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
        card = commit.files.get("README.md")
        front = re.match(rb"---\n(.*?)\n---\n", card.content, re.DOTALL) if card else None
        lines = [x.split(": ", 1) for x in front[1].decode().splitlines() if ": " in x] if front else []
        return 200, body | {"siblings": siblings, "tags": [], "cardData": dict(lines)}, {}

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
            self._take_chunks(repo, each["oid"])
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
                self._take_chunks(repo, value["oid"])
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

    def _may_write(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        return 200, {}, {}

    def _branch(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        if match["revision"] in repo.branches:
            return _error(409, "")
        repo.branches[match["revision"]] = list(repo.branches["main"])
        return 201, {}, {}

    def _xet_token(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        if self.server.xet is None:
            return _error(404, "")
        address, until = f"local://{self.server.xet}", 4_000_000_000
        body = {"casUrl": address, "accessToken": "xet", "exp": until}
        return 200, body, {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}

    def _take_chunks(self, repo: Repo, oid: str) -> None:
        """A file whose chunks are in the store may be named."""
        hub = self.server
        if hub.xet is not None and oid in hub.coming and any(hub.xet.rglob("default.*")):
            repo.objects.add(oid)
            hub.blobs[oid] = hub.coming[oid]

    def _discussions(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        name = {"name": match["repo"], "type": "model"}
        found = [
            {"title": commits[-1].summary, "num": int(branch.rpartition("/")[2]), "author": {"name": "me"}}
            | {"createdAt": "2026-01-01T00:00:00.000Z", "status": "open", "repo": name, "isPullRequest": True}
            for branch, commits in repo.branches.items()
            if branch.startswith("refs/pr/")
        ]
        return 200, {"discussions": found, "count": len(found), "start": 0}, {}

    def _duplicate(self, repo: Repo, match: re.Match[str]) -> tuple[int, Any, dict[str, str]]:
        value = json.loads(self.body)
        target = self.server.repos.get(value["target"]["name"])
        known = {f.sha256 for commits in repo.branches.values() for c in commits for f in c.files.values() if f.lfs}
        if target is None or not self._is_known():
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
    (rf"/api/models/{_REPO}/auth-check/write", "_may_write"),
    (rf"/api/models/{_REPO}/discussions", "_discussions"),
    (rf"/api/models/{_REPO}/xet-write-token/(?P<revision>.+)", "_xet_token"),
    (rf"/api/models/{_REPO}/branch/(?P<revision>.+)", "_branch"),
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
