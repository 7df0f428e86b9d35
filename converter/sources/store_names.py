"""How places in object stores are named: `s3://bucket/folder`, `gs://bucket/folder`, `az://container/folder`."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from converter.errors import UsageError
from converter.text import show

SCHEMES = ("s3", "gs", "az")
"""Amazon's S3 and what speaks its protocol, Google's Cloud Storage, Azure's Blob Storage."""

_NAME = re.compile(rf"(?P<scheme>{'|'.join(SCHEMES)})://(?P<bucket>[^/@\s]+)(?P<folder>(?:/[^\0]*)?)", re.DOTALL)


class StoreName(NamedTuple):
    """A bucket and a folder in it, which may be empty."""

    scheme: str
    bucket: str
    folder: str

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.scheme}://{posixpath.join(self.bucket, self.folder)}"


def is_in_store(text: str) -> bool:
    """True for what begins with a scheme of an object store."""
    return text.partition("://")[0] in SCHEMES and "://" in text


def store_name(text: str) -> StoreName | None:
    """What `text` names in an object store; None for anything else.

    Raises:
        UsageError: a scheme and no bucket behind it, credentials in the name, or a way up (`store-name`).
    """
    if not is_in_store(text):
        return None
    match = _NAME.fullmatch(text)
    parts = match["folder"].removeprefix("/").removesuffix("/").split("/") if match else []
    if match is None or any(p in (".", "..") or (p == "" and len(parts) > 1) for p in parts):
        scheme = text.partition("://")[0]
        what = f"a name that begins with {scheme}:// and is not one of a bucket and a folder in it"
        raise UsageError("store-name", what, expected=f"{scheme}://bucket/folder, and no credentials in it")
    return StoreName(match["scheme"], match["bucket"], "/".join(parts))


def local_path(text: str) -> str:
    """The path that `file:///...` names; anything else as it is.

    Raises:
        UsageError: a file on another machine (`store-name`).
    """
    if not text.startswith("file://"):
        return text
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise UsageError("store-name", f"{show(text)} names no folder of this machine", expected="file:///folder")
    return str(Path(unquote(parts.path)))
