"""A plan's output goes to the Hub without being on the disk.

One commit at the end makes a model of what was sent; before it nothing is to be seen in the repository.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.core.files import sparse
from converter.core.files.names import CARD
from converter.core.files.opening import open_input, read_exact
from converter.core.files.origins import Origin
from converter.core.writer.plan import Plan
from converter.core.writer.reporter import Reporter
from converter.core.writer.shard_plan import ShardPlan
from converter.core.writer.write import Accept, Receipt
from converter.diagnostic import Again
from converter.errors import Refused
from converter.publish.file_by_file import Knobs, Sender, Work, send_plan
from converter.publish.manifest import MAX_FILE, LocalFile, Manifest
from converter.publish.push import Pushed, card_there, expect_no_stale, make_repository, upload
from converter.publish.push import push as commit
from converter.publish.requests import Destination, call
from converter.text import show

Card = Callable[[Mapping[str, Any], str], str]
"""Makes the model card of the receipt's content and the card that the repository has."""


@dataclass(frozen=True)
class Published:
    """A finished run; `copied` are files that the Hub copied from the source's repository."""

    receipt: Receipt
    pushed: Pushed
    copied: tuple[str, ...]


def stage_of(where: Destination) -> Path:
    """The name beside which the stage lies, in the current folder."""
    return Path(where.repo_id.replace("/", "--"))


def write_to_hub(
    plan: Plan,
    where: Destination,
    *,
    reporter: Reporter,
    card: Card,
    jobs: int = 1,
    memory: int | None = None,
    resume: bool = True,
    verify: bool = True,
    accept: Accept | None = None,
) -> Published:
    """Write a plan's output into a repository, with room for one of its files.

    Raises:
        Refused: the disk, the memory, an input or the Hub does not allow it; the repository is as it was.
        VerificationFailed: what was written is not what it should be.
        Interrupted: a signal came; the same command goes on.
    """
    import huggingface_hub

    client: Any = huggingface_hub.utils
    client.disable_progress_bars()  # the reporter tells
    _expect_small_enough(plan)

    def start(work: Work, _kept: Mapping[str, Any]) -> _HubSender:
        names = {s.file for s in plan.shards} | plan.side_files.keys()
        expect_no_stale(names, make_repository(where), where)
        return _HubSender(work, where)

    def finish(sender: _HubSender, content: Mapping[str, Any], beside: list[LocalFile]) -> Pushed:
        text = card(content, card_there(where)).encode()
        beside = [*beside, LocalFile(CARD, Path(CARD), len(text), text)]
        weights = [LocalFile(s.file, sender.work.stage.folder / s.file, s.size) for s in plan.shards]
        digests = sender.digests | {f.name: f.digests() for f in beside}
        wanted = Manifest((*weights, *beside), digests, ())
        return commit(wanted, where, reporter=reporter, ready=sender.ready)

    destination = f"{where.repo_id}@{where.revision}"
    knobs = Knobs(stage_of(where), destination, reporter, jobs, memory, resume, verify, accept)
    receipt, sender, pushed = send_plan(plan, knobs, start, finish)
    return Published(receipt, pushed, tuple(sender.copied))


def _expect_small_enough(plan: Plan) -> None:
    """Refuse a file that is larger than the Hub takes (`hub-file-too-large`)."""
    largest = max(plan.shards, key=lambda s: s.size)
    if largest.size > MAX_FILE:
        what = f"{show(largest.file)} would have {largest.size} bytes, and the Hub takes {MAX_FILE} in one file"
        raise Refused("hub-file-too-large", what, next=Again(("--max-shard-size", "5GB")))


class _HubSender(Sender):
    """Brings one file after another to the Hub.

    Attributes:
        ready: what makes the commit's operation of a file that was sent.
        digests: sha256 of what was sent; git's own name is empty, since large files are not compared by it.
    """

    def __init__(self, work: Work, where: Destination) -> None:
        from huggingface_hub import HfApi

        super().__init__(work)
        self._where = where
        self._api = HfApi(token=where.token)
        self.ready: dict[str, Callable[[], Any]] = {}
        self.digests: dict[str, tuple[str, str]] = {}
        self.copied: list[str] = []

    def is_there(self, shard: ShardPlan, line: Mapping[str, Any]) -> bool:
        """Whether the Hub still holds what was sent: it removes what no commit names after a while."""
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        sha = line.get("sha256")
        if not isinstance(sha, str):
            return False
        info = UploadInfo(size=shard.size, sample=b"", sha256=bytes.fromhex(sha))
        found = call(lambda: post_lfs_batch_info([info], self._where.token, "model", self._where.repo_id), self._where)[
            0
        ]
        if len(found) != 1 or found[0].get("oid") != sha or found[0].get("actions"):
            return False
        self._take(shard, line, sha, _add(shard, sha))
        return True

    def bring(self, shard: ShardPlan, line: Mapping[str, Any], path: Path) -> None:
        """Send a file's content; the commit at the end names it."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(path_in_repo=shard.file, path_or_fileobj=str(path))
        upload(self._api, self._where, operation)
        sha = operation.upload_info.sha256.hex()
        if getattr(operation, "_is_uploaded", True):
            self.work.stage.record({**line, "sha256": sha})
            self._take(shard, line, sha, _add(shard, sha))
        else:
            # The Hub keeps it in git, as nothing but a small file is: its content goes with the commit.
            content = path.read_bytes()
            self.digests[shard.file] = LocalFile(shard.file, path, shard.size, content).digests()
            self.lines[shard.file] = line
            self.ready[shard.file] = lambda: CommitOperationAdd(path_in_repo=shard.file, path_or_fileobj=content)

    def _take(self, shard: ShardPlan, line: Mapping[str, Any], sha: str, ready: Callable[[], Any]) -> None:
        self.lines[shard.file], self.digests[shard.file], self.ready[shard.file] = line, (sha, ""), ready

    def copies(self, shard: ShardPlan) -> bool:
        """Let the Hub copy a file that is one of the source's, byte by byte; False where it is none, or it can't."""
        source = _source_of(shard)
        if source is None or source.origin.sha256 is None:
            return False
        make = _copies(self._where, source.origin, shard.file)
        if make is None:
            return False
        self._take(shard, {"measures": {}}, source.origin.sha256, make)
        self.copied.append(shard.file)
        source.is_copied = True
        return True


def _add(shard: ShardPlan, sha: str) -> Callable[[], Any]:
    """What commits a content that is on the Hub: the client takes it for a file that it has sent itself."""

    def make() -> Any:
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.lfs import UploadInfo

        operation: Any = CommitOperationAdd(path_in_repo=shard.file, path_or_fileobj=b"")
        operation.upload_info = UploadInfo(size=shard.size, sample=b"", sha256=bytes.fromhex(sha))
        operation._upload_mode, operation._is_uploaded = "lfs", True
        return operation

    return make


def _source_of(shard: ShardPlan) -> sparse.SparseFile | None:
    """The file on the Hub that this one will be equal to, inferred from the plan: same header, places and size."""
    runs = [run for entry in shard.entries for run in entry.runs or ()]
    if not runs or shard.is_torch or any(e.runs is None for e in shard.entries) or len({r.file for r in runs}) > 1:
        return None
    file = sparse.at(runs[0].file) if runs[0].file else None
    if file is None or file.size != shard.size or shard.tail:
        return None
    for entry in shard.entries:
        offset = entry.offset
        for run in entry.runs or ():
            if run.offset != offset:
                return None
            offset += run.length
    fd = open_input(file.path)
    try:
        return file if read_exact(fd, 0, len(shard.header), file=str(file.path)) == shard.header else None
    finally:
        os.close(fd)


def _copies(where: Destination, origin: Origin, name: str) -> Callable[[], Any] | None:
    """What commits a copy of a file of another repository, or of another commit of this one; None where it can't."""
    from huggingface_hub import CommitOperationCopy

    if origin.repo_id == where.repo_id:
        return lambda: CommitOperationCopy(origin.name, name, src_revision=origin.commit)
    known = {f.name for f in dataclasses.fields(CommitOperationCopy)}
    if "src_repo_id" not in known or not _may_copy(where, origin):
        return None
    return lambda: CommitOperationCopy(
        origin.name, name, src_revision=origin.commit, src_repo_id=origin.repo_id, src_repo_type="model"
    )


def _may_copy(where: Destination, origin: Origin) -> bool:
    """Ask the Hub to put the content where our repository can name it, as the client does before such a commit.

    It can't between storage regions, nor what is not kept by chunks: then the file is sent.
    """
    import huggingface_hub

    client: Any = huggingface_hub.utils
    if origin.xet_hash is None or origin.sha256 is None:
        return False
    url = f"{huggingface_hub.HfApi().endpoint}/api/models/{origin.repo_id}/lfs-files/duplicate"
    file = {"xetHash": origin.xet_hash, "sha256": origin.sha256, "filename": origin.name}
    body = {"target": {"type": "model", "name": where.repo_id}, "files": [file]}
    try:
        answer: Any = client.get_session().post(url, headers=client.build_hf_headers(token=where.token), json=body)
        return answer.status_code == 200 and not answer.json().get("failed")
    except Exception:  # no copy is not a failure
        return False
