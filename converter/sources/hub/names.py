"""How models on the Hub are named: `owner/name@revision`, `hf://owner/name@revision/folder/in/it`."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from converter.errors import UsageError
from converter.sources.store_names import is_in_store
from converter.text import show

SCHEME = "hf://"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_SPECIAL = re.compile(r"refs/(?:pr|convert)/[^/]+")
_NAME = re.compile(
    r"(?P<repo>[^@/]+/[^@/]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.*))?", re.DOTALL
)
"""As huggingface_hub's file system reads them: a branch with a slash in its name is written with %2F.
Source: https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/hf_file_system.py
"""


class HubName(NamedTuple):
    """A repository, its revision, and the folder in it; empty for the repository itself."""

    repo_id: str
    revision: str | None
    folder: str = ""


def hub_name(text: str) -> HubName | None:
    """What `hf://owner/name[@revision][/folder]` and `owner/name@revision[/folder]` name; None for anything else.

    Raises:
        UsageError: `hf://` and no repository behind it (`hub-repo-id`).
    """
    is_url = text.startswith(SCHEME)
    match = _NAME.fullmatch(text.removeprefix(SCHEME))
    parts = (match["folder"] or "").rstrip("/").split("/") if match else []
    is_sound = match is not None and REPO_ID.fullmatch(match["repo"]) and (parts == [""] or _is_below(parts))
    if match is None or not is_sound:
        if is_url:
            expected = f"{SCHEME}owner/name, {SCHEME}owner/name@revision or {SCHEME}owner/name/folder"
            raise UsageError("hub-repo-id", f"{show(text)} names no repository", expected=expected)
        return None
    if not is_url and (match["revision"] is None or os.path.lexists(text)):
        return None
    revision = unquote(match["revision"]) if match["revision"] else None
    return HubName(match["repo"], revision, "/".join(parts))


def _is_below(parts: list[str]) -> bool:
    return all(p not in ("", ".", "..") and "\0" not in p and "\\" not in p for p in parts)


def is_on_hub(text: str) -> bool:
    """True for what is not a path here and names a model on the Hub, as far as the text tells."""
    if text.startswith(SCHEME) or hub_name(text) is not None:
        return True
    path = Path(text)
    return REPO_ID.fullmatch(text) is not None and not os.path.lexists(text) and not path.parent.is_dir()


def as_reference(text: str, revision: str | None = None) -> str:
    """A name on the Hub with `hf://`, to which a folder can be added with a slash; a local path as it is.

    Args:
        revision: is put in where the name has none.
    """
    if not is_on_hub(text):
        return text
    named = hub_name(text if text.startswith(SCHEME) else SCHEME + text)
    assert named is not None
    at = named.revision or revision
    quoted = "" if at is None else "@" + (at if _SPECIAL.fullmatch(at) else at.replace("/", "%2F"))
    return f"{SCHEME}{named.repo_id}{quoted}" + (f"/{named.folder}" if named.folder else "")


def as_base(name: object, revision: object = None) -> str:
    """What to type behind `--base` for a base that an adapter records: its name on the Hub, else `BASE`.

    A record alone makes nothing be fetched: the user does, by typing it.
    """
    if not isinstance(name, str) or not REPO_ID.fullmatch(name) or not is_on_hub(name):
        return "BASE"
    is_plain = isinstance(revision, str) and re.fullmatch(r"[\w.-]+", revision, re.ASCII) is not None
    return f"{name}@{revision}" if is_plain else name


def below(asked: str, root: Path, folder: Path) -> str:
    """A folder in, beside or above the one that a user named, as they would write it.

    Args:
        asked: what the user wrote for `root`, a path or a name on the Hub.
    """
    relative = os.path.relpath(folder, root)
    if relative == ".":
        return asked
    reference = as_reference(asked)
    if is_in_store(asked):
        scheme, _, place = asked.partition("://")
        return f"{scheme}://" + posixpath.normpath(posixpath.join(place, relative))
    if not reference.startswith(SCHEME):
        joined = os.path.join(asked, relative)
        return os.path.normpath(joined) if relative.startswith("..") else joined
    return SCHEME + posixpath.normpath(posixpath.join(reference.removeprefix(SCHEME), relative))
