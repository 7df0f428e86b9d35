"""From what a user typed to a folder: a local path, an entry of the Hub's cache, or a download.

A mistyped path is told as one: with what is there and the nearest match, never as an error of the Hub's client.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from converter.errors import Refused, UsageError, show
from converter.sources.survey import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    file_names,
    folder_kind,
    repository_of,
    snapshot_of,
)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_OLD_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_REFERENCE = re.compile(r"[\w][\w.+-]*(?:/[\w][\w.+-]*)*", re.ASCII)

WANTED = (
    MODEL_CONFIG, ADAPTER_CONFIG, MODEL_WEIGHTS, MODEL_INDEX, "model-*-of-*.safetensors", ADAPTER_WEIGHTS,
    "value_head.safetensors", "value_head.bin", "value_head.pt",
    "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "*.tiktoken", "*.spm", "tokenizer.model.v*", "tekken.json", "normalizer.json",
    "chat_template.*", "chat_templates/*", "additional_chat_templates/*",
    "*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "*.py",
)  # fmt: skip
"""What is read of a repository, and so downloaded; `.py` files are text to us, and only `--keep-code` copies them."""


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
        UsageError: a file that is no part of a checkpoint (`path-not-a-folder`), a revision of a local folder
            (`revision-of-folder`), or several snapshots (`revision-needed`).
        Refused: nothing local has that name (`path-missing`), with what is there and the nearest match; not in the
            cache and not to be downloaded (`hub-not-cached`, `cache-incomplete`); the download failed (`hub-download`).
    """
    path = Path(text).expanduser() if text else Path()
    if text and path.is_dir():
        return _local(path, revision, asked_for=allow_download)
    if text and path.exists():
        return _local(_folder_of(path), revision, asked_for=allow_download)
    is_path = not text or text.startswith((".", "/", "~"))
    if not is_path and (_REPO_ID.fullmatch(text) or _OLD_REPO_ID.fullmatch(text)):
        cached = _cached(text, revision)
        if cached is not None and (missing := missing_files(cached.path)):
            return _complete(cached, missing, token, allow_download)
        if cached is not None:
            return cached
        # The folder that would hold it is here: a mistyped path, not a model of the Hub.
        if _REPO_ID.fullmatch(text) and not path.parent.is_dir():
            return _download(text, revision, token, allow_download)
    raise _missing(path, text)


def _folder_of(path: Path) -> Path:
    if path.name.endswith((".safetensors", ".json")):
        return path.parent
    raise UsageError("path-not-a-folder", "this is a file; name the folder it is in", where=show(path))


def _local(path: Path, revision: str | None, *, asked_for: bool) -> Located:
    """A folder; one that the Hub's cache made for a repository stands for its snapshot.

    Args:
        asked_for: the user named the revision; an adapter that records one beside a local path means nothing by it.
    """
    repo_id = repository_of(path)
    if repo_id is not None and (path / "snapshots").is_dir():
        found = _snapshot(path, repo_id, revision)
        if found is None:
            raise Refused(
                "hub-not-cached", "this entry of the Hub's cache has no snapshot of that revision", where=show(path)
            )
        return found
    snapshot = snapshot_of(path)
    if revision is not None and asked_for and (snapshot is None or not snapshot[1].startswith(revision)):
        what = "a local folder has no revisions; --revision goes with a Hub id"
        raise UsageError("revision-of-folder", what, where=show(path), got=f"--revision {show(revision)}")
    return Located(path, *(snapshot or (None, None)))


def _missing(path: Path, text: str) -> Refused:
    """What is there instead: in the nearest folder above that exists."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        names = []
    parts = path.relative_to(folder).parts if path != folder else ()
    near = get_close_matches(parts[0], names, n=1, cutoff=0.6) if parts else []
    shown = ", ".join(show(n) for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    here = "this folder" if str(folder) == "." else show(folder)
    return Refused(
        "path-missing",
        f"there is no folder {show(text)!r}",
        expected=f"a folder; {here} has {shown or 'no folders'}",
        next=f"did you mean {show(_beside(folder, near[0], text))}?" if near else None,
    )


def _beside(folder: Path, name: str, text: str) -> str:
    """The near match as the user would type it."""
    found = str(folder / name)
    return f"./{found}" if text.startswith("./") and not found.startswith((".", "/")) else found


# The cache


def _cached(repo_id: str, revision: str | None) -> Located | None:
    """The snapshot of a repository in the Hub's cache, or None."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + repo_id.replace("/", "--"))
    return _snapshot(folder, repo_id, revision)


def _snapshot(folder: Path, repo_id: str, revision: str | None) -> Located | None:
    """The snapshot of the revision asked for, else of main, else the only one.

    Raises:
        UsageError: several, and nothing says which (`revision-needed`).
    """
    snapshots = folder / "snapshots"
    names = sorted(p.name for p in snapshots.iterdir() if p.is_dir()) if snapshots.is_dir() else []
    commit = _commit(folder, revision or "main")
    if commit not in names and revision is not None and re.fullmatch(r"[0-9a-f]{7,39}", revision, re.ASCII):
        matching = [n for n in names if n.startswith(revision)]
        commit = matching[0] if len(matching) == 1 else None
    if commit not in names and revision is None and commit is None and names:
        if len(names) > 1:
            what = f"the Hub's cache has {len(names)} snapshots of {show(repo_id)}, and none is marked as main"
            listed = ", ".join(show(n) for n in names[:8])
            raise UsageError("revision-needed", what, got=listed, next=f"--revision {show(names[-1])}")
        commit = names[0]
    return Located(snapshots / commit, repo_id, commit) if commit in names and commit is not None else None


def _commit(folder: Path, revision: str) -> str | None:
    """The commit that a branch, a tag or a commit stands for, as far as the cache knows."""
    if _COMMIT.fullmatch(revision):
        return revision
    if not _REFERENCE.fullmatch(revision) or ".." in revision:
        return None
    try:
        text = (folder / "refs" / revision).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return text if _COMMIT.fullmatch(text) else None


def missing_files(folder: Path) -> list[str]:
    """Files that a checkpoint's folder should have and lacks: an interrupted download leaves such a snapshot."""
    from converter.safetensors_io import read_index

    names = frozenset(n for n in file_names(folder) if (folder / n).exists())
    if folder_kind(names) == "adapter":
        return [n for n in (ADAPTER_CONFIG,) if n not in names]
    missing = [] if MODEL_CONFIG in names else [MODEL_CONFIG]
    if MODEL_WEIGHTS in names or folder_kind(names) is None or MODEL_INDEX not in names:
        return missing if folder_kind(names) else [*missing, MODEL_WEIGHTS]
    try:
        listed = sorted(set(read_index(folder / MODEL_INDEX, root=folder).weight_map.values()))
    except Refused:
        return missing  # a broken index is for the source to tell
    return missing + [n for n in listed if n not in names]


# The Hub


def _complete(found: Located, missing: list[str], token: str | None, allow_download: bool) -> Located:
    """The snapshot with its missing files downloaded.

    Raises:
        Refused: they are not to be downloaded, or the repository has no such files (`cache-incomplete`).
    """
    assert found.repo_id is not None
    if allow_download and not _offline():
        found = _fetch(found.repo_id, found.revision, token, [*WANTED, *missing])
        missing = missing_files(found.path)
        if not missing:
            return found
    if folder_kind(file_names(found.path)) is not None and missing == [MODEL_CONFIG]:
        return found  # such a repository; the source says what it lacks
    listed = ", ".join(show(n) for n in missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    raise Refused(
        "cache-incomplete",
        f"the Hub's cache has {show(found.repo_id)} in part only; missing: {listed}",
        where=show(found.path),
        next=f"hf download {show(found.repo_id)} --revision {show(found.revision)}",
    )


def _download(repo_id: str, revision: str | None, token: str | None, allow_download: bool) -> Located:
    if not allow_download or _offline():
        why = "downloads are off (HF_HUB_OFFLINE)" if allow_download else "a recorded base is not downloaded unasked"
        raise Refused(
            "hub-not-cached",
            f"{show(repo_id)} is neither a folder here nor in the Hub's cache, and {why}",
            next=f"name it: --base {show(repo_id)}, or a local folder" if not allow_download else "name a local folder",
        )
    found = _fetch(repo_id, revision, token, list(WANTED))
    missing = missing_files(found.path)
    return _complete(found, missing, token, allow_download) if missing else found


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _fetch(repo_id: str, revision: str | None, token: str | None, patterns: list[str]) -> Located:
    """Some files of a repository, into the Hub's cache."""
    import huggingface_hub

    get: Any = huggingface_hub.snapshot_download
    try:
        path = Path(get(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:  # the client's own, its transport's and the system's
        _refuse_download(repo_id, token, error)
    return Located(path, repo_id, path.name if _COMMIT.fullmatch(path.name) else None)


_REASONS = {
    "RepositoryNotFoundError": "the Hub has no such model, or it is private and the token does not open it",
    "GatedRepoError": "the model is gated: accept its terms on its page, and give a token (HF_TOKEN)",
    "RevisionNotFoundError": "the model has no such revision",
    "LocalEntryNotFoundError": "the Hub can't be reached",
    "OfflineModeIsEnabled": "downloads are off (HF_HUB_OFFLINE)",
}


def _refuse_download(repo_id: str, token: str | None, error: Exception) -> NoReturn:
    """The client's error in our words: its own text may quote headers, so a token in it is blotted out."""
    text = str(error)
    for secret in (token, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        text = text.replace(secret, "***") if secret else text
    reason = next(
        (words for name, words in _REASONS.items() if name in [c.__name__ for c in type(error).__mro__]), None
    )
    raise Refused(
        "hub-download",
        f"{show(repo_id)} is no folder here, and it can't be had from the Hub: {reason or type(error).__name__}",
        got=show(text.strip().partition("\n")[0]),
        next="check the name and the network; or name a local folder",
    ) from None
