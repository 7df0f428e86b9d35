"""What is asked of the Hub to read a repository: its list of files at one commit, and bytes of them. The client's own
session, token and retries; its errors in our words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

from converter.diagnostic import Again
from converter.errors import Refused
from converter.sources.hub.patience import Patience, heard, trouble
from converter.text import show

TIMEOUT = 60.0
MOST_FILES = 20_000

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)
T = TypeVar("T")

Kind = Literal["model", "dataset"]
"""What a repository is of; the Hub names both alike, in places of their own."""


@dataclass(frozen=True)
class ListedFile:
    """A file of a commit; `sha256` of its content where it is stored with git-lfs or xet, else git's own `blob_id`."""

    name: str
    size: int
    sha256: str | None
    blob_id: str
    xet_hash: str | None = None

    @property
    def digest(self) -> str:
        """Whichever stands for the content."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: nothing of another one is ever read."""

    repo_id: str
    commit: str
    token: str | None
    files: tuple[ListedFile, ...]

    def read(self, file: ListedFile, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a file.

        Raises:
            Refused: they can't be had (`hub-download`), or come from another state of the file (`hub-range`).
        """
        if start == stop:
            return b""
        return ask(lambda: self._read(file, start, stop), self.repo_id, self.token)

    def _read(self, file: ListedFile, start: int, stop: int) -> bytes:
        import huggingface_hub

        client: Any = huggingface_hub.utils
        url = huggingface_hub.hf_hub_url(self.repo_id, file.name, revision=self.commit)
        headers = dict(client.build_hf_headers(token=self.token)) | {"Accept-Encoding": "identity"}
        is_part = (start, stop) != (0, file.size)
        if is_part:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        answer: Any = client.http_backoff("GET", url, headers=headers, timeout=TIMEOUT, max_retries=0)
        client.hf_raise_for_status(answer)
        content: bytes = answer.content
        self._expect_range(answer, file, start, stop, is_part=is_part)
        if len(content) != stop - start:
            raise ConnectionError(f"{len(content)} bytes came instead of {stop - start}")
        return content

    def _expect_range(self, answer: Any, file: ListedFile, start: int, stop: int, *, is_part: bool) -> None:
        """The answer is of the commit and the file that were listed, and of the bytes that were asked for."""
        wrong = ""
        if is_part:
            given = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status_code != 206 or given is None:
                wrong = f"the answer is the whole file (status {answer.status_code}), not a range of it"
            elif tuple(map(int, given.groups())) != (start, stop - 1, file.size):
                wrong = f"the answer holds {show(given[0])}, asked were bytes {start}-{stop - 1}/{file.size}"
        for each in (*answer.history, answer):
            commit, etag = each.headers.get("X-Repo-Commit"), each.headers.get("X-Linked-Etag")
            if commit is not None and commit != self.commit:
                wrong = f"the answer is of commit {show(commit)}, asked was {self.commit}"
            if etag is not None and etag.strip('W/"') != file.digest:
                wrong = f"the answer is of content {show(etag)}, listed was {file.digest}"
        if wrong:
            raise Refused(
                "hub-range",
                f"a part of {show(file.name)} can't be read: {wrong}",
                where=show(self.repo_id),
                next=f"hf download {show(self.repo_id)}",
            )


def open_repository(repo_id: str, revision: str | None, token: str | None) -> Repository:
    """The commit that a revision stands for now, and its files.

    Raises:
        Refused: there is no such repository or revision for this token, or the Hub can't be reached (`hub-download`).
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    info = ask(lambda: api.repo_info(repo_id, revision=revision), repo_id, token)
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit, re.ASCII):
        raise Refused("hub-download", f"the Hub names no commit of {show(repo_id)}", got=show(commit))
    return Repository(repo_id, commit, token, tuple(list_files(repo_id, commit, token)))


def list_files(repo_id: str, commit: str, token: str | None, kind: Kind = "model") -> list[ListedFile]:
    """Every file of a commit with its size and digest.

    Raises:
        Refused: a name that leads out of the repository, or more files than a model has (`hub-listing`).
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    listing = partial(api.list_repo_tree, repo_id, recursive=True, revision=commit, repo_type=kind)
    tree: list[Any] = ask(lambda: list(listing()), repo_id, token)
    found = []
    for entry in tree:
        blob = getattr(entry, "blob_id", None)
        if blob is None:
            continue
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in entry.path or entry.size < 0:
            raise Refused("hub-listing", f"the Hub lists an unsafe name: {show(entry.path)}", where=show(repo_id))
        lfs = getattr(entry, "lfs", None)
        found.append(
            ListedFile(entry.path, entry.size, lfs.sha256 if lfs else None, blob, getattr(entry, "xet_hash", None))
        )
    if len(found) > MOST_FILES:
        raise Refused("hub-listing", f"{len(found)} files are no model", where=show(repo_id))
    return found


def expect_safe_endpoint() -> None:
    """Tokens go nowhere unencrypted but to this machine: what HF_ENDPOINT names is https, or on loopback.

    Raises:
        Refused: it is neither (`hub-endpoint`).
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    host = (address.hostname or "").lower()
    is_here = host == "localhost" or host == "::1" or re.fullmatch(r"127(?:\.\d{1,3}){3}", host, re.ASCII) is not None
    if address.scheme != "https" and not (address.scheme == "http" and is_here):
        what = "HF_ENDPOINT is not encrypted, and a token would be sent to it in the open"
        raise Refused("hub-endpoint", what, got=show(constants.ENDPOINT), next="use its https address")


def ask(request: Callable[[], T], repo_id: str, token: str | None) -> T:
    """A request that reads, repeated where another try may help.

    Raises:
        Refused: it did not succeed (`hub-download`), or HF_ENDPOINT is not to be asked (`hub-endpoint`).
    """
    expect_safe_endpoint()
    patience = Patience()
    while True:
        try:
            with heard():
                return request()
        except Refused:
            raise
        except Exception as error:  # the client's own, its transport's and the system's
            if not _may_pass(error) or not patience.again(error):
                refuse(repo_id, token, error)


def _may_pass(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    names = {c.__name__ for c in type(error).__mro__}
    # ConnectError: nobody listens, which the client has tried for a while.
    return "ConnectError" not in names and bool(
        names & {"TransportError", "HTTPError", "ConnectionError", "JSONDecodeError", "UnicodeDecodeError"}
    )


_REASONS = {
    "RepositoryNotFoundError": "the Hub has no such model, or it is private and the token does not open it",
    "GatedRepoError": "the model is gated",
    "RevisionNotFoundError": "the model has no such revision",
    "DisabledRepoError": "the model was disabled by the Hub",
    "LocalEntryNotFoundError": "the Hub can't be reached",
    "ConnectError": "the Hub can't be reached",
    "OfflineModeIsEnabled": "downloads are off (HF_HUB_OFFLINE)",
}


_ADVICE = {
    "GatedRepoError": "accept its terms on its page, then hf auth login, or set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; for a private model hf auth login, or set HF_TOKEN",
    "RevisionNotFoundError": "check the revision; a slash in a branch's name is written as %2F",
}


def blotted(text: str, token: str | None = None) -> str:
    """A text without the token that was given, the one that the client finds, and whatever else looks like one."""
    from converter.sources.hub.secrets import without_secrets

    return without_secrets(text, *([token] if token else []))


def refuse(repo_id: str, token: str | None, error: Exception) -> NoReturn:
    """The client's error in our words: its own text may quote headers, so a token in it is blotted out."""
    text = blotted(str(error), token)
    names = [c.__name__ for c in type(error).__mro__]
    # A gated repository's error is a kind of the missing one's.
    reason = next((_REASONS[name] for name in names if name in _REASONS), None)
    advice: Any = next((_ADVICE[n] for n in names if n in _ADVICE), None)
    if reason is None and _may_pass(error):
        reason, advice = trouble(error), Again()
    advice = advice or "check the name and the network; or name a local folder"
    raise Refused(
        "hub-download",
        f"{show(repo_id)} is not a folder here, and it can't be had from the Hub: {reason or type(error).__name__}",
        got=show(text.strip().partition("\n")[0]),
        next=advice,
    ) from None
