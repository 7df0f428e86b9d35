"""A folder becomes a repository on the Hub: one commit of what was verified here, compared with what is there
afterwards.

Everything can be repeated: what is there already is not sent again, and a commit whose answer was lost is recognised.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from converter.errors import Refused, UsageError, fold, show
from converter.files import open_input
from converter.side_files import travels
from converter.sources.hub_client import expect_safe_endpoint
from converter.sources.survey import ADAPTER_CONFIG, MODEL_CONFIG

RECEIPT, CARD = "rlhf-convert.json", "README.md"
ATTEMPTS = 5
FIRST_WAIT = 1.0
MAX_FILE = 50_000_000_000
"""Bytes of one file that the Hub takes. Source: https://huggingface.co/docs/hub/repositories-recommendations"""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WEIGHTS = re.compile(
    r"(?:modeling/)?(?:model|adapter_model|value_head|pytorch_model)[\w.-]*\.(?:safetensors|bin|pt|json)", re.ASCII
)
_MODEL_WEIGHTS = re.compile(
    r"(?:model|pytorch_model|adapter_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?", re.ASCII
)
"""What transformers and PEFT look for."""

_BLOCK = 1 << 22
T = TypeVar("T")


@dataclass(frozen=True)
class LocalFile:
    """A file to push; `content` stands in for a file that is made in memory (the card)."""

    name: str
    path: Path
    size: int
    content: bytes | None = None

    def digests(self) -> tuple[str, str]:
        """sha256 of the bytes, and git's own name of the blob."""
        sha = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for block in self._blocks():
            sha.update(block)
            blob.update(block)
        return sha.hexdigest(), blob.hexdigest()

    def _blocks(self) -> Iterator[bytes]:
        if self.content is not None:
            yield self.content
            return
        fd = open_input(self.path)
        try:
            while block := os.read(fd, _BLOCK):
                yield block
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Manifest:
    """What goes into the repository.

    Attributes:
        digests: file name mapped to its sha256 and its git blob id.
        left_out: names of files in the folder that do not go.
    """

    files: tuple[LocalFile, ...]
    digests: Mapping[str, tuple[str, str]]
    left_out: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


@dataclass(frozen=True)
class Destination:
    """Where to push, and how; a branch that is not there is made, from main.

    Attributes:
        removes_stale: weight files of another model that the repository holds go with the same commit.
    """

    repo_id: str
    token: str | None = None
    public: bool = False
    revision: str = "main"
    create_pr: bool = False
    message: str = "Upload with rlhf-convert"
    removes_stale: bool = False


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    Attributes:
        url: of the commit, or of the pull request.
        sent: names of the files that were sent; none where all were there already.
    """

    url: str
    commit: str
    sent: tuple[str, ...]


def files_to_push(folder: Path, *, keep_code: bool) -> tuple[list[LocalFile], list[str]]:
    """The files of a folder that belong on the Hub, and the names of those that do not.

    Raises:
        Refused: a link out of the folder or no regular file (`input-outside`, ...), a file that the Hub does not take.
    """
    found, left_out = [], []
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        is_ours = _WEIGHTS.fullmatch(name) or name in (MODEL_CONFIG, ADAPTER_CONFIG, RECEIPT, CARD)
        if not is_ours and not travels(name, keep_code=keep_code):
            left_out.append(name)
            continue
        fd = open_input(path, root=folder)
        size = os.fstat(fd).st_size
        os.close(fd)
        if size > MAX_FILE:
            raise Refused(
                "hub-file-too-large",
                f"{show(name)} has {size} bytes, and the Hub takes {MAX_FILE} in one file",
                next="rlhf-convert reshard DIR OUT --max-shard-size 5GB",
            )
        found.append(LocalFile(name, path, size))
    return found, left_out


def manifest(files: Sequence[LocalFile], left_out: Sequence[str], *, told: Callable[[str], None]) -> Manifest:
    """Digests of every file; `told` is called with each name before it is read."""
    digests = {}
    for file in files:
        told(file.name)
        digests[file.name] = file.digests()
    return Manifest(tuple(files), digests, tuple(left_out))


def check_destination(where: Destination) -> str:
    """The account that the token opens, which must be able to write.

    Raises:
        UsageError: no repository of that form (`hub-repo-id`).
        Refused: no token, one that is not valid (`hub-token`), or one that only reads (`hub-read-only`).
    """
    if not _REPO_ID.fullmatch(where.repo_id):
        raise UsageError("hub-repo-id", f"{show(where.repo_id)} names no repository", expected="owner/name")
    from huggingface_hub import HfApi, get_token

    expect_safe_endpoint()
    token = where.token or get_token()
    if not token:
        raise Refused("hub-token", "there is no token for the Hub", next="hf auth login, or set HF_TOKEN")
    me = call(lambda: HfApi(token=token).whoami(), where)
    role = (me.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise Refused("hub-read-only", "the token can only read", next="make one that can write, and set HF_TOKEN")
    return str(me.get("name"))


def make_repository(where: Destination) -> list[str]:
    """The repository and its branch, made where they are missing; the names of the files that it has."""
    from huggingface_hub import HfApi

    api = HfApi(token=where.token)
    call(lambda: api.create_repo(where.repo_id, private=not where.public, exist_ok=True), where)
    if where.revision != "main":
        call(lambda: api.create_branch(where.repo_id, branch=where.revision, exist_ok=True), where)
    return list(_files_there(api, where, where.revision))


def push(
    wanted: Manifest,
    where: Destination,
    *,
    told: Callable[[str], None],
    ready: Mapping[str, Callable[[], Any]] | None = None,
) -> Pushed:
    """Send what is not there yet, make one commit of it, and compare the repository with the manifest.

    Args:
        ready: what makes the commit's operation of a file whose content is on the Hub already, by the file's name.

    Raises:
        Refused: the Hub says no (`hub-refused`), can't be reached (`hub-unreachable`), changes under us (`hub-moved`),
            or holds something else afterwards (`hub-differs`, `hub-unchecked`); weights of another model
            are there (`hub-stale-weights`).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=where.token)
    make_repository(where)
    for attempt in range(ATTEMPTS):
        head = call(lambda: api.repo_info(where.repo_id, revision=where.revision), where).sha
        there = _files_there(api, where, head)
        differing = _differing(wanted, there)
        stale = expect_no_stale([f.name for f in wanted.files], there, where)
        if not differing and not stale:
            url = f"{api.endpoint}/{where.repo_id}/commit/{head}"
            return Pushed(url, str(head), ())
        made_already = ready or {}
        operations = []
        for file in differing:
            if file.name in made_already:
                operations.append(made_already[file.name]())
                continue
            told(file.name)
            operations.append(_operation(CommitOperationAdd, file))
            upload(api, where, operations[-1])
        operations += [CommitOperationDelete(name) for name in stale]
        try:
            made = api.create_commit(
                where.repo_id,
                operations=operations,
                commit_message=where.message,
                revision=where.revision,
                parent_commit=head,
                create_pr=where.create_pr,
            )
        except Exception as error:  # the client's own and its transport's
            if where.create_pr or not _is_passing(error) or attempt + 1 == ATTEMPTS:
                _refuse(error, where)
            # It may have landed, its answer lost: the next round looks before it sends anything.
            time.sleep(FIRST_WAIT * 2**attempt)
            continue
        revision = made.oid
        try:
            left = _differing(wanted, _files_there(api, where, revision))
        except Refused as error:
            what = f"the commit was made, and what the repository holds now could not be compared ({error.code})"
            again = "run the same command again: it compares, and sends nothing twice"
            raise Refused("hub-unchecked", what, where=show(where.repo_id), got=error.got, next=again) from error
        if left:
            what = f"the repository does not hold what was sent: {fold([show(f.name) for f in left])}"
            raise Refused("hub-differs", what, where=show(where.repo_id), next="run the same command again")
        return Pushed(str(made.pr_url or made.commit_url), revision, tuple(f.name for f in differing))
    raise Refused("hub-unreachable", "the Hub did not take the commit", where=show(where.repo_id), next="try again")


def upload(api: Any, where: Destination, operation: Any) -> None:
    """Send a large file's content; small ones go with the commit.

    Raises:
        Refused: the Hub does not take it.
    """
    call(
        lambda: api.preupload_lfs_files(
            where.repo_id, additions=[operation], revision=where.revision, free_memory=False, create_pr=where.create_pr
        ),
        where,
    )


def _operation(kind: Any, file: LocalFile) -> Any:
    return kind(path_in_repo=file.name, path_or_fileobj=file.content if file.content is not None else str(file.path))


def _files_there(api: Any, where: Destination, revision: str | None) -> dict[str, Any]:
    """The files of a commit by name, as the Hub lists them."""
    tree = call(lambda: list(api.list_repo_tree(where.repo_id, recursive=True, revision=revision)), where)
    return {e.path: e for e in tree if hasattr(e, "blob_id")}


def expect_no_stale(names: Collection[str], there: Collection[str], where: Destination) -> list[str]:
    """Weight files that would lie beside the new ones; they are removed where the user consents.

    Raises:
        Refused: there are such files, and loaders may take them for the model (`hub-stale-weights`).
    """
    stale = sorted(n for n in there if n not in names and _MODEL_WEIGHTS.fullmatch(n))
    if stale and not where.removes_stale:
        error = Refused(
            "hub-stale-weights",
            f"the repository holds weights of another model beside: {fold([show(n) for n in stale])}. "
            "Loaders may read them instead",
            where=show(where.repo_id),
            next="push to another repository, or remove them with the same commit: --allow hub-stale-weights",
        )
        error.consent = True
        raise error
    return stale


def _differing(wanted: Manifest, there: Mapping[str, Any]) -> list[LocalFile]:
    """Files that the repository does not hold as they are here, by size and digest."""
    differing = []
    for file in wanted.files:
        sha, blob = wanted.digests[file.name]
        entry = there.get(file.name)
        same = entry is not None and entry.size == file.size
        if same and entry is not None:
            same = entry.lfs.sha256 == sha if entry.lfs else entry.blob_id == blob
        if not same:
            differing.append(file)
    return differing


def licence_of(repo_id: str, token: str | None) -> str | None:
    """The licence that a model's page declares; None where it can't be had."""
    try:
        from huggingface_hub import HfApi

        card = HfApi(token=token).model_info(repo_id, timeout=10).card_data
    except Exception:  # a card without a licence is no reason to stop
        return None
    value = getattr(card, "license", None)
    return value if isinstance(value, str) else None


def call(request: Callable[[], T], where: Destination) -> T:
    """A request that may be repeated, with the client's errors in our words."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except Exception as error:  # the client's own and its transport's
            if not _is_passing(error) or attempt + 1 == ATTEMPTS:
                _refuse(error, where)
            time.sleep(FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable")


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_passing(error: Exception) -> bool:
    """True for what another try may cure: a busy or broken server, a lost connection, a commit that came between."""
    status = _status(error)
    if status is not None:
        return status in (408, 409, 412, 429) or status >= 500
    names = {c.__name__ for c in type(error).__mro__}
    return bool(names & {"TransportError", "HTTPError", "ConnectionError", "TimeoutError", "RemoteProtocolError"})


_REASONS = {
    401: ("hub-token", "the token is not valid", "hf auth login, or set HF_TOKEN"),
    403: ("hub-forbidden", "the token may not write there", "make one that may, or push to a repository of yours"),
    404: ("hub-missing", "there is no such repository or revision, or the token does not open it", None),
    412: ("hub-moved", "somebody else commits to it at the same time", "run the same command again"),
    429: ("hub-busy", "the Hub limits the rate of requests", "wait, and run the same command again"),
}


def _refuse(error: Exception, where: Destination) -> NoReturn:
    status = _status(error)
    text = str(error).strip().partition("\n")[0]
    for secret in (where.token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        text = text.replace(secret, "***") if secret else text
    if status in _REASONS:
        code, what, advice = _REASONS[status]
        raise Refused(code, what, where=show(where.repo_id), got=show(text), next=advice) from None
    if status is None or status >= 500:
        what = "the Hub can't be reached or does not answer; nothing was published"
        raise Refused(
            "hub-unreachable", what, where=show(where.repo_id), got=show(text), next="run the same command again"
        )
    raise Refused("hub-refused", "the Hub says no", where=show(where.repo_id), got=show(text)) from None
