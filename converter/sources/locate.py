"""From what a user typed to a folder: a local path, an entry of the Hub's cache, or a download. A mistyped path is told as one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from converter.errors import Refused, UsageError, show

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_PATTERNS = [
    "config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*", "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip


@dataclass(frozen=True)
class Located:
    """A folder to open; `repo_id` and `revision` (a commit) where it is from the Hub."""

    path: Path
    repo_id: str | None
    revision: str | None


def resolve(
    text: str, *, revision: str | None = None, token: str | None = None, allow_download: bool = True
) -> Located:
    """The folder that `text` means.

    `./x`, `../x`, `/x`, `~/x`, anything that exists, and anything but `owner/name` is local. Otherwise it is a Hub id:
    taken from the cache, else downloaded.

    Raises:
        UsageError: nothing local has that name (`path-missing`), with what is there and the nearest match.
        Refused: not in the cache and not to be downloaded (`hub-not-cached`), or the download failed (`hub-download`).
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return Located(path, None, None)
    if path.exists():
        return Located(_folder_of(path), None, None)
    if text.startswith((".", "/", "~")) or not _REPO_ID.fullmatch(text) or path.parent.is_dir():
        if not (_REPO_ID.fullmatch(text) and _in_cache(text, revision)):
            raise _missing(path, text)
    return _from_hub(text, revision, token, allow_download)


def _folder_of(path: Path) -> Path:
    if path.name.endswith((".safetensors", ".json")):
        return path.parent
    raise UsageError("path-not-a-folder", "this is a file; name the folder it is in", where=show(path))


def _missing(path: Path, text: str) -> Refused:
    """What is there instead: in the nearest folder above that exists."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    first_missing = path.relative_to(folder).parts[0] if folder != path else path.name
    near = get_close_matches(first_missing, names, n=1, cutoff=0.6)
    shown = ", ".join(show(n) for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return Refused(
        "path-missing",
        f"there is no folder {show(text)}",
        expected=f"a folder; {show(folder)} has {shown or 'no folders'}",
        next=f"did you mean {show(folder / near[0] if str(folder) != '.' else near[0])}?" if near else None,
    )


def _in_cache(repo_id: str, revision: str | None) -> bool:
    try:
        return _cached(repo_id, revision) is not None
    except UsageError:
        return True


def _cached(repo_id: str, revision: str | None) -> Located | None:
    """The snapshot of a repository in the Hub's cache: of the revision asked for, else of main, else the only one."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repo_id.replace("/", "--"))
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    commit = _commit(folder, revision or "main")
    names = sorted(p.name for p in snapshots.iterdir() if p.is_dir())
    if commit is None and revision is None and len(names) == 1:
        commit = names[0]
    if commit is None and revision is not None and len(revision) >= 7:
        matching = [n for n in names if n.startswith(revision)]
        commit = matching[0] if len(matching) == 1 else None
    if commit is None and revision is None and names:
        listed = ", ".join(show(n) for n in names)
        raise UsageError(
            "revision-needed",
            f"the cache has several snapshots of {show(repo_id)}",
            got=listed,
            next="--revision COMMIT",
        )
    if commit is None or not (snapshots / commit).is_dir():
        return None
    return Located(snapshots / commit, repo_id, commit)


def _commit(folder: Path, revision: str) -> str | None:
    if _COMMIT.fullmatch(revision):
        return revision
    reference = folder / "refs" / revision
    if ".." in revision or not reference.is_file():
        return None
    text = reference.read_text(encoding="ascii", errors="replace").strip()
    return text if _COMMIT.fullmatch(text) else None


def _is_whole(folder: Path) -> bool:
    """True where a snapshot has weights and every shard that its index lists."""
    from converter.sources.hf import INDEX, WEIGHTS, read_folder
    from converter.sources.peft import WEIGHTS as ADAPTER_WEIGHTS

    if (folder / ADAPTER_WEIGHTS).exists():
        return True
    if not ((folder / WEIGHTS).exists() or (folder / INDEX).exists()):
        return False
    return not any(f.code == "shard-missing" for f in read_folder(folder)[0].faults)


def _from_hub(repo_id: str, revision: str | None, token: str | None, allow_download: bool) -> Located:
    cached = _cached(repo_id, revision)
    if cached is not None and (_is_whole(cached.path) or not allow_download or _offline()):
        return cached
    if not allow_download or _offline():
        why = "downloads are off (HF_HUB_OFFLINE)" if allow_download else "a recorded base is not downloaded unasked"
        raise Refused(
            "hub-not-cached",
            f"{show(repo_id)} is neither a folder here nor in the Hub's cache, and {why}",
            next=f"name it: --base {show(repo_id)}, or a local folder" if not allow_download else "name a local folder",
        )
    return _download(repo_id, revision, token)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _download(repo_id: str, revision: str | None, token: str | None) -> Located:
    """The files that are read, into the Hub's cache; the client's errors in our words, without the token."""
    import huggingface_hub

    get: Any = huggingface_hub.snapshot_download
    try:
        path = Path(get(repo_id, revision=revision, token=token, allow_patterns=_PATTERNS))
    except Exception as error:
        reason = show(str(error).replace(token, "***") if token else error)
        raise Refused(
            "hub-download",
            f"{show(repo_id)} is no folder here, and it can't be had from the Hub: {type(error).__name__}",
            got=reason,
            next="check the name, the network and, for gated models, the token (HF_TOKEN); or name a local folder",
        ) from error
    return Located(path, repo_id, path.name if _COMMIT.fullmatch(path.name) else None)
