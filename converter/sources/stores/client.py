"""What is asked of an object store: its list of objects below a folder, bytes of them, what is there now, new objects.

fsspec's file systems speak with the stores, with the credentials that their own libraries find; their errors come in
our words, without what could be a credential.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from converter.diagnostic import Next
from converter.errors import Refused
from converter.sources.hub.secrets import without_secrets
from converter.sources.store_names import StoreName
from converter.text import show

ATTEMPTS = 6
FIRST_WAIT = 0.2
MOST_OBJECTS = 20_000
PART_BYTES = 16 << 20
IN_FLIGHT = 4
"""Parts of a file that are sent at once."""

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""The file system of each scheme; its package is imported under its own name."""

_STATES = ("ETag", "etag", "md5Hash", "content_md5", "crc32c", "generation", "VersionId")
_TIMES = ("LastModified", "last_modified", "updated", "mtime")

T = TypeVar("T")


@dataclass(frozen=True)
class Object:
    """An object below a folder: its name from there, its bytes, and what stands for its state, in hexadecimal."""

    name: str
    key: str
    size: int
    mark: str


class Store:
    """A bucket, through fsspec's file system for it.

    Raises:
        Refused: its package is not installed (`store-missing`).
    """

    def __init__(self, place: StoreName) -> None:
        package = PACKAGES[place.scheme]
        if importlib.util.find_spec(package) is None:
            what = f"{place.scheme}:// needs the package {package}, which is not installed beside rlhf-convert"
            raise Refused("store-missing", what, next=f"pip install 'rlhf-convert[remote]' {package}")
        import fsspec

        self.place = place
        self.files: Any = self.ask(lambda: fsspec.filesystem(place.scheme, use_listings_cache=False), "store-read")

    def key(self, name: str) -> str:
        """An object's name as the file system takes it."""
        return "/".join(p for p in (self.place.bucket, self.place.folder, name) if p)

    def objects(self) -> list[Object]:
        """Every object below the folder.

        Raises:
            Refused: the store can't be read (`store-read`), or names what is no file of a model (`store-listing`).
        """
        root = self.key("")
        found: Mapping[str, Mapping[str, Any]] = self.ask(lambda: self.files.find(root, detail=True), "store-read")
        if len(found) > MOST_OBJECTS:
            raise Refused("store-listing", f"{len(found)} objects are no model", where=str(self.place))
        listed = []
        for key, info in sorted(found.items()):
            name = key.removeprefix(root).removeprefix("/")
            if not name:
                continue  # the name itself is an object's: it marks a folder
            if any(p in ("", ".", "..") or "\0" in p for p in name.split("/")):
                raise Refused("store-listing", f"an object has an unsafe name: {show(key)}", where=str(self.place))
            listed.append(Object(name, key, int(info["size"]), self._mark(key, info)))
        return listed

    def _mark(self, key: str, info: Mapping[str, Any]) -> str:
        state = [[k, str(info[k])] for k in (*_STATES, *_TIMES) if info.get(k) is not None]
        if not state:
            what = "the store says neither when an object was written nor what stands for its content"
            raise Refused("store-listing", what, where=show(key))
        text = json.dumps([self.place.scheme, key, int(info["size"]), state])
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, each: Object, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`.

        Raises:
            Refused: they can't be had (`store-read`).
        """
        if start == stop:
            return b""

        def request() -> bytes:
            content: bytes = self.files.cat_file(each.key, start=start, end=stop)
            if len(content) != stop - start:
                raise ConnectionError(f"{len(content)} bytes came instead of {stop - start}")
            return content

        return self.ask(request, "store-read")

    def expect_same(self, each: Object) -> None:
        """Refuse where the object is not what it was when it was listed.

        Raises:
            Refused: it was written again or removed (`input-changed`).
        """
        try:
            info = self.ask(lambda: self.files.info(each.key), "store-read")
            same = self._mark(each.key, info) == each.mark
        except Refused as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            same = False
        if not same:
            raise Refused(
                "input-changed",
                "the object was written again or removed while it was being converted; nothing was published",
                where=show(f"{self.place.scheme}://{each.key}"),
                next="run the same command again once nothing writes to the input",
            )

    def put(self, name: str, content: Path | bytes) -> str:
        """Send a file, in parts where it is large, or bytes; what stands for the object's state, in hexadecimal.

        Raises:
            Refused: the store does not take it, or has less than was sent (`store-write`).
        """
        key = self.key(name)
        size = len(content) if isinstance(content, bytes) else content.stat().st_size

        def request() -> str:
            if isinstance(content, bytes):
                self.files.pipe_file(key, content)
            else:
                self.files.put_file(str(content), key, **self._how(size))
            info = self.files.info(key)
            if int(info["size"]) != size:
                raise ConnectionError(f"the object has {info['size']} bytes, and {size} were sent")
            return self._mark(key, info)

        return self.ask(request, "store-write")

    def _how(self, size: int) -> dict[str, Any]:
        """How a file is sent: in parts of which a few are in memory; an object has at most 10,000."""
        if self.place.scheme == "az":
            return {"overwrite": True}
        part = max(PART_BYTES, -(-size // 9_000))
        return {"chunksize": part, "max_concurrency": IN_FLIGHT} if self.place.scheme == "s3" else {"chunksize": part}

    def ask(self, request: Callable[[], T], code: str) -> T:
        """A request, repeated where another try may help.

        Raises:
            Refused: it did not succeed (`code`).
        """
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except Exception as error:  # the file system's own, its transport's and the system's
                if not _may_pass(error) or attempt + 1 == ATTEMPTS:
                    self._refuse(error, code)
                time.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError("unreachable")

    def _refuse(self, error: Exception, code: str) -> NoReturn:
        text = without_secrets(str(error).strip().partition("\n")[0])
        raise Refused(
            code,
            f"the store refuses or can't be reached: {_reason(error)}",
            where=str(self.place),
            got=show(f"{type(error).__name__}: {text}"),
            next=_advice(error, self.place.scheme),
        ) from error


def _may_pass(error: Exception) -> bool:
    names = {c.__name__ for c in type(error).__mro__}
    if names & {"NoCredentialsError", "FileNotFoundError", "PermissionError", "ParamValidationError"}:
        return False
    return isinstance(error, OSError | EOFError) or bool(
        names & {"ClientError", "BotoCoreError", "HTTPClientError", "HttpError", "AzureError", "TimeoutError"}
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket or object"
    if isinstance(error, PermissionError):
        return "the credentials do not open it"
    return "no credentials are found" if "Credentials" in type(error).__name__ else "a request failed again and again"


def _advice(error: Exception, scheme: str) -> Next:
    if isinstance(error, FileNotFoundError):
        return "check the name"
    told = {
        "s3": "aws configure, or set AWS_PROFILE; AWS_ENDPOINT_URL for a store that is not Amazon's",
        "gs": "gcloud auth application-default login",
        "az": "set AZURE_STORAGE_ACCOUNT_NAME and what logs in to it",
    }
    return told[scheme]
