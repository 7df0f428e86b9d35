"""From what a user typed to a folder: a local path, an entry of the Hub's cache, or a download.

A mistyped path is told as one: with what is there and the nearest match, never as an error of the Hub's client.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from converter.core.files.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ADDED_TOKENS,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    SPECIAL_TOKENS,
)
from converter.core.files.opening import read_limited
from converter.diagnostic import Again, Command, Steps, quoted
from converter.errors import Refused, UsageError
from converter.families.words import HEAD_FILES
from converter.sources.hub.names import REPO_ID as _REPO_ID
from converter.sources.hub.names import SCHEME, hub_name
from converter.sources.store_names import StoreName, local_path, store_name
from converter.sources.survey import file_names, folder_kind, repository_of, snapshot_of
from converter.text import nearest, show

_OLD_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_REFERENCE = re.compile(r"[\w][\w.+-]*(?:/[\w][\w.+-]*)*", re.ASCII)

__all__ = ["SCHEME", "WANTED", "Located", "hub_name", "missing_files", "resolve"]

WANTED = (
    MODEL_CONFIG, ADAPTER_CONFIG, MODEL_WEIGHTS, MODEL_INDEX, "model-*-of-*.safetensors", ADAPTER_WEIGHTS,
    *HEAD_FILES,
    GENERATION_CONFIG, "tokenizer*.json", SPECIAL_TOKENS, ADDED_TOKENS, "vocab.*",
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
    text: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_download: bool = True,
    in_parts: bool = False,
    whole: bool = False,
    config_alone: bool = False,
) -> Located:
    """The folder that `text` means.

    `./x`, `../x`, `/x`, `~/x`, anything that exists, and anything but `owner/name` is local. Otherwise it is a Hub id:
    taken from the cache, else read in parts or downloaded. `hf://owner/name` is never local, and may go on with a
    folder in the repository.

    Args:
        in_parts: what is not in the cache is read from the Hub where it is needed, and the cache stays as it is.
        config_alone: a config in the cache will do where downloads are off.
        whole: every file of the repository may be wanted, as of a run's folder: the cache serves if it has them all.

    Raises:
        UsageError: a file that is not part of a checkpoint (`path-not-a-folder`), a revision of a local folder
            (`revision-of-folder`), several snapshots (`revision-needed`), or two revisions (`usage`).
        Refused: nothing local has that name (`path-missing`), with what is there and the nearest match; not in the
            cache and not to be downloaded (`hub-not-cached`, `cache-incomplete`); the download failed
            (`hub-download`).
    """
    if (place := store_name(text)) is not None:
        return _in_store(place, allow_download)
    text = local_path(text)
    named = hub_name(text)
    if named is not None:
        if revision and named.revision and revision != named.revision:
            raise UsageError("usage", f"two revisions: {show(text)} and {show(revision)}; give one")
        at = named.revision or revision
        if named.folder:
            return _folder_on_hub(named.repo_id, named.folder, at, token, in_parts)
        return _on_hub(named.repo_id, at, token, allow_download, in_parts, whole, config_alone)
    path = _path_of(text)
    if text and path.is_dir():
        return _local(path, revision, asked_for=allow_download)
    if text and path.exists():
        return _local(_folder_of(path), revision, asked_for=allow_download)
    is_path = not text or text.startswith((".", "/", "~"))
    if not is_path and (_REPO_ID.fullmatch(text) or _OLD_REPO_ID.fullmatch(text)):
        # Where the folder is here that would hold it, this is a mistyped path, not a model of the Hub.
        is_hub_id = _REPO_ID.fullmatch(text) is not None and not path.parent.is_dir()
        if is_hub_id or _cached(text, revision) is not None:
            return _on_hub(text, revision, token, allow_download, in_parts, whole, config_alone)
    raise _missing(path, text)


def _in_store(place: StoreName, allow_download: bool) -> Located:
    """A folder of an object store, whose bytes come when they are read.

    Raises:
        Refused: it is recorded somewhere and was not asked for (`store-unasked`); see also `store_mirror`.
    """
    if not allow_download:
        what = f"{place} is in an object store, and nothing is fetched from there unasked"
        raise Refused("store-unasked", what, next=Again(("--base", str(place))))
    from converter.sources.stores.mirror import store_mirror

    return Located(store_mirror(place), None, None)


def _on_hub(
    repo_id: str,
    revision: str | None,
    token: str | None,
    allow_download: bool,
    in_parts: bool,
    whole: bool,
    config_alone: bool,
) -> Located:
    """A repository: in the cache and whole there, else in parts, else downloaded."""
    cached = _cached(repo_id, revision)
    if in_parts and whole and not _offline():
        return _every_file(repo_id, "", cached, revision, token)
    missing = [] if cached is None else missing_files(cached.path)
    if cached is not None and not missing:
        return cached
    if in_parts and not _offline():
        return _in_parts(repo_id, cached.revision if cached is not None else revision, token)
    if cached is not None and config_alone and MODEL_CONFIG in file_names(cached.path):
        return cached
    if cached is not None:
        return _complete(cached, missing, token, allow_download)
    return _download(repo_id, revision, token, allow_download)


def _folder_on_hub(repo_id: str, folder: str, revision: str | None, token: str | None, in_parts: bool) -> Located:
    """A folder in a repository.

    Raises:
        Refused: there is none of that name (`path-missing`), or it is not in the cache and not to be read from the
            Hub (`hub-not-cached`).
    """
    cached = _cached(repo_id, revision)
    if in_parts and not _offline():
        found = _every_file(repo_id, folder, cached, revision, token)
    elif cached is not None:
        found = cached
    else:
        return _download(repo_id, revision, token, allow_download=False)
    path = found.path / folder
    if path.is_dir():
        return Located(path, repo_id, found.revision)
    if path.is_file() and path.name.endswith((".safetensors", ".json")):
        return Located(path.parent, repo_id, found.revision)
    above = next(p for p in path.parents if p.is_dir())
    names = sorted(p.name for p in above.iterdir() if p.is_dir())
    raise Refused(
        "path-missing",
        f"{show(repo_id)} has no folder {show(folder)!r}",
        expected=", ".join(show(n) for n in names[:8]) or "it has no folders",
    )


def _every_file(repo_id: str, folder: str, cached: Located | None, revision: str | None, token: str | None) -> Located:
    """The snapshot in the cache, if it has every file that the Hub lists below a folder; else the Hub's, in parts."""
    from converter.sources.hub.mirror import mirror

    pinned = cached.revision if cached is not None else revision
    path, commit = mirror(repo_id, pinned, token)
    listed = [p for p in (path / folder).rglob("*") if p.is_file()]
    if cached is not None and commit == cached.revision and listed:
        pairs = ((p, cached.path / p.relative_to(path)) for p in listed)
        if all(here.is_file() and here.stat().st_size == p.stat().st_size for p, here in pairs):
            return cached
    return Located(path, repo_id, commit)


def _path_of(text: str) -> Path:
    """What a user typed, or an adapter recorded, as a path.

    Raises:
        Refused: longer than a path can be, or of a user's home that there is not (`path-missing`).
    """
    try:
        path = Path(text).expanduser() if text else Path()
        path.exists()
    except PermissionError as error:
        what = f"a folder on the way to {show(text, 80)} can't be opened: {_why(error)}"
        raise Refused("path-missing", what) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise Refused("path-missing", f"{show(text, 80)!r} is not a path: {_why(error)}") from error
    return path


def _why(error: Exception) -> str:
    return error.strerror or "it can't be looked at" if isinstance(error, OSError) else show(error)


def _folder_of(path: Path) -> Path:
    from converter.sources.finding import kind_of
    from converter.sources.one_file import is_one

    if path.name.endswith(".ckpt") or (is_one(path) and kind_of(path.parent) in (None, "hf")):
        return path  # Lightning's whole checkpoint, or a script's, which lies beside others
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
            what = "this entry of the Hub's cache has no snapshot of that revision"
            raise Refused("hub-not-cached", what, where=show(path))
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
    near = nearest(parts[0], names, n=1, cutoff=0.6) if parts else []
    shown = ", ".join(show(n) for n in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    here = "this folder" if str(folder) == "." else show(folder)
    return Refused(
        "path-missing",
        f"there is no folder {quoted(text)}",
        expected=f"a folder; {here} has {shown or 'no folders'}",
        next=f"did you mean {quoted(_beside(folder, near[0], text))}?" if near else None,
    )


def _beside(folder: Path, name: str, text: str) -> str:
    """The near match as the user would type it."""
    found = str(folder / name)
    return f"./{found}" if text.startswith("./") and not found.startswith((".", "/")) else found


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
            raise UsageError("revision-needed", what, got=listed, next=Again(("--revision", names[-1])))
        commit = names[0]
    return Located(snapshots / commit, repo_id, commit) if commit in names and commit is not None else None


def _commit(folder: Path, revision: str) -> str | None:
    """The commit that a branch, a tag or a commit stands for, as far as the cache knows."""
    if _COMMIT.fullmatch(revision):
        return revision
    if not _REFERENCE.fullmatch(revision) or ".." in revision:
        return None
    try:
        text = (
            read_limited(folder / "refs" / revision, limit=4096, root=folder / "refs")
            .decode("ascii", "replace")
            .strip()
        )
    except Refused:
        return None
    return text if _COMMIT.fullmatch(text) else None


def missing_files(folder: Path) -> list[str]:
    """Files that a checkpoint's folder should have and lacks: an interrupted download leaves such a snapshot."""
    from converter.core.formats.safetensors_io import read_index

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
        next=Command("download", (found.repo_id or "", "--revision", found.revision or "main"), program="hf"),
    )


def _download(repo_id: str, revision: str | None, token: str | None, allow_download: bool) -> Located:
    if not allow_download or _offline():
        why = "downloads are off (HF_HUB_OFFLINE)" if allow_download else "nothing is downloaded unasked"
        local = Command("download", (repo_id, "--local-dir", f"./{repo_id.rpartition('/')[2]}"), program="hf")
        raise Refused(
            "hub-not-cached",
            f"{show(repo_id)} is neither a folder here nor in the Hub's cache, and {why}",
            next=Steps(local, ", and name that folder; a base is named with --base"),
        )
    found = _fetch(repo_id, revision, token, list(WANTED))
    missing = missing_files(found.path)
    return _complete(found, missing, token, allow_download) if missing else found


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _fetch(repo_id: str, revision: str | None, token: str | None, patterns: list[str]) -> Located:
    """Some files of a repository, into the Hub's cache."""
    from converter.sources.hub.download import download

    path = download(repo_id, revision, token, patterns)
    return Located(path, repo_id, path.name if _COMMIT.fullmatch(path.name) else None)


def _in_parts(repo_id: str, revision: str | None, token: str | None) -> Located:
    """The repository as a folder whose bytes come when they are read.

    Raises:
        Refused: see `converter.sources.hub.mirror.mirror`.
    """
    from converter.sources.hub.mirror import mirror

    path, commit = mirror(repo_id, revision, token)
    return Located(path, repo_id, commit)
