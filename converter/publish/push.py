"""A folder becomes a repository on the Hub: one commit of what was verified here, compared with what is there
afterwards.

Everything can be repeated: what is there already is not sent again, and a commit whose answer was lost is recognised.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.core.files.names import CARD, WEIGHTS_WORD
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused, UsageError
from converter.publish.manifest import LocalFile, Manifest
from converter.publish.requests import Destination, call, is_passing, refuse
from converter.sources.hub.client import expect_safe_endpoint
from converter.sources.hub.patience import Patience, heard
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.core.writer.reporter import Reporter

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_MODEL_WEIGHTS = re.compile(rf"(?:{WEIGHTS_WORD})(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?", re.ASCII)
"""What transformers and PEFT look for."""


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
        raise Refused(
            "hub-token",
            "there is no token for the Hub",
            next=Steps(Command("auth", ("login",), program="hf"), ", or set HF_TOKEN"),
        )
    me = call(lambda: HfApi(token=token).whoami(), where)
    role = (me.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise Refused("hub-read-only", "the token can only read", next="make one that can write, and set HF_TOKEN")
    return str(me.get("name"))


def make_repository(where: Destination) -> list[str]:
    """The repository and its branch, made where they are missing; the names of the files that it has.

    Raises:
        Refused: the token may not make it, or not write to it (`hub-forbidden`), or the Hub can't be asked.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=where.token)
    call(lambda: api.create_repo(where.repo_id, private=not where.public, exist_ok=True), where)
    if not where.create_pr:
        _expect_write_access(api, where)
    if where.revision != "main":
        call(lambda: api.create_branch(where.repo_id, branch=where.revision, exist_ok=True), where)
    return list(_files_there(api, where, where.revision))


def push(
    wanted: Manifest,
    where: Destination,
    *,
    reporter: Reporter,
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
    from huggingface_hub import HfApi

    api = HfApi(token=where.token)
    make_repository(where)
    started = False
    patience, asked = Patience(), False
    while True:
        with _not_known(asked):
            head = call(lambda: api.repo_info(where.repo_id, revision=where.revision), where).sha
            there = _files_there(api, where, head)
        differing = _differing(wanted, there)
        stale = expect_no_stale([f.name for f in wanted.files], there, where)
        if not differing and not stale:
            url = f"{api.endpoint}/{where.repo_id}/commit/{head}"
            return Pushed(url, str(head), ())
        if where.create_pr and (open_already := _pull_request(api, wanted, where)) is not None:
            return open_already
        if not started and ready is None:
            reporter.start(sum(f.size for f in differing), len(differing))
            started = True
        operations = _operations(api, differing, where, ready, reporter)
        operations += [_deletes(name) for name in stale]
        asked = True
        try:
            with heard():
                made = api.create_commit(
                    where.repo_id,
                    operations=operations,
                    commit_message=where.message,
                    revision=where.revision,
                    parent_commit=head,
                    create_pr=where.create_pr,
                )
        except Exception as error:  # the client's own and its transport's
            # It may have landed, its answer lost: the next round looks before it sends anything.
            if not is_passing(error) or not patience.again(error):
                refuse(error, where, sent=True)
            continue
        reporter.checking("what the repository holds")
        _expect_there(api, wanted, where, made.oid)
        return Pushed(str(made.pr_url or made.commit_url), made.oid, tuple(f.name for f in differing))


@contextmanager
def _not_known(asked: bool) -> Iterator[None]:
    """Where a commit was asked for and no answer came, another failure does not mean that nothing was published."""
    try:
        yield
    except Refused as error:
        if asked:
            error.what = "the Hub did not answer when the commit was made: all of it is there, or nothing"
            error.next = Again()
        raise


def _expect_write_access(api: Any, where: Destination) -> None:
    """A repository that exists may be somebody else's: the client takes it as made."""
    if "write" not in inspect.signature(api.auth_check).parameters:
        return  # clients before 2: sending will tell
    try:
        call(lambda: api.auth_check(where.repo_id, write=True), where)
    except Refused as error:
        if error.code != "hub-missing":  # the repository is there: this Hub does not know the question
            raise


def _expect_there(api: Any, wanted: Manifest, where: Destination, commit: str) -> None:
    """The commit holds what was to be sent.

    Raises:
        Refused: it does not (`hub-differs`), or that can't be asked (`hub-unchecked`).
    """
    try:
        left = _differing(wanted, _files_there(api, where, commit))
    except Refused as error:
        what = f"the commit was made, and what the repository holds now could not be compared ({error.code})"
        again = "run the same command again: it compares, and sends nothing twice"
        raise Refused("hub-unchecked", what, where=show(where.repo_id), got=error.got, next=again) from error
    if left:
        what = f"the repository does not hold what was sent: {fold([show(f.name) for f in left])}"
        raise Refused("hub-differs", what, where=show(where.repo_id), next=Again())


def _pull_request(api: Any, wanted: Manifest, where: Destination) -> Pushed | None:
    """The open pull request of an earlier run that holds what is wanted: its answer may have been lost."""
    found = call(lambda: list(api.get_repo_discussions(where.repo_id)), where)
    for each in sorted(found, key=lambda d: -d.num):
        if not each.is_pull_request or each.status not in ("open", "draft") or each.title != where.message:
            continue
        reference = f"refs/pr/{each.num}"
        if not _differing(wanted, _files_there(api, where, reference)):
            head = call(lambda r=reference: api.repo_info(where.repo_id, revision=r), where).sha  # type: ignore[misc]
            return Pushed(f"{api.endpoint}/{where.repo_id}/discussions/{each.num}", str(head), ())
    return None


def _operations(
    api: Any,
    files: Sequence[LocalFile],
    where: Destination,
    ready: Mapping[str, Callable[[], Any]] | None,
    reporter: Reporter,
) -> list[Any]:
    """The commit's operations; what is large is sent on the way, and told byte by byte."""
    operations = []
    for file in files:
        if ready is not None and file.name in ready:
            operations.append(ready[file.name]())
            continue
        source = file.content if file.content is not None else str(file.path)
        told = _Told(file, reporter)
        operations.append(addition(file.name, source, told))
        upload(api, where, operations[-1])
        if ready is None:
            told.finish()
            reporter.shard_done(file.name, file.size, False)
    return operations


class _Told:
    """Tells a reporter of the bytes of a file as they are read, at most once each: a part may be sent again."""

    def __init__(self, file: LocalFile, reporter: Reporter) -> None:
        self._file, self._reporter, self._done = file, reporter, 0

    def __call__(self, count: int) -> None:
        count = min(count, self._file.size - self._done)
        if count > 0:
            self._done += count
            self._reporter.advance(count, self._file.name)

    def finish(self) -> None:
        """All of it is there: what was not read was there before, or went another way."""
        self(self._file.size)


def _deletes(name: str) -> Any:
    from huggingface_hub import CommitOperationDelete

    return CommitOperationDelete(name)


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


def card_there(where: Destination) -> str:
    """The card that the repository has; empty where it has none, or is not there yet."""
    from converter.sources.hub.client import open_repository

    repository = open_repository(where.repo_id, where.revision, where.token)
    found = next((f for f in repository.files if f.name == CARD), None)
    return "" if found is None else repository.read(found, 0, found.size).decode("utf-8", "replace")


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
            next=Steps(
                "push to another repository, or remove them with the same commit: ",
                Again(("--allow", "hub-stale-weights")),
            ),
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
    except Exception:  # a card without a licence is not a reason to stop
        return None
    value = getattr(card, "license", None)
    return value if isinstance(value, str) else None


def addition(name: str, source: str | bytes, told: Callable[[int], None]) -> Any:
    """The client's operation for a file, from a path or from bytes; `told` is called with counts of bytes."""
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            """The content to read; without the client's own bar."""
            with super().as_file(with_tqdm=False) as file:
                yield _Counted(file, told)

    return Addition(path_in_repo=name, path_or_fileobj=source)


class _Counted:
    """A file whose reads are counted."""

    def __init__(self, file: Any, told: Callable[[int], None]) -> None:
        self._file, self._told = file, told

    def read(self, size: int = -1) -> bytes:
        block: bytes = self._file.read(size)
        self._told(len(block))
        return block

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read(1 << 16):
            yield block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
