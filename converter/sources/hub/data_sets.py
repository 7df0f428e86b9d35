"""Data sets on the Hub by name: `hf://datasets/owner/name[@revision][/file]`, one file of it brought here."""

from __future__ import annotations

import fnmatch
from pathlib import Path, PurePosixPath

from converter.errors import Refused, UsageError
from converter.sources.hub.client import ask, list_files
from converter.sources.hub.download import download
from converter.sources.hub.names import SCHEME, hub_name
from converter.text import show

PREFIX = f"{SCHEME}datasets/"
_ROWS = (".parquet", ".jsonl", ".ndjson", ".json")
_ABOUT = ("dataset_info*.json", "dataset_infos.json", ".*")
"""Files that tell of the rows of others."""


def is_data_set(text: str) -> bool:
    """True for the name of a data set on the Hub."""
    return text.startswith(PREFIX)


def file_of(text: str) -> Path:
    """The file with the rows, in the Hub's cache, its digest as the Hub lists it.

    Args:
        text: names the file, or a folder or a whole data set that has one file of rows only.

    Raises:
        UsageError: no data set has such a name (`hub-repo-id`), it has no such file (`path-missing`), or several, of
            which one has to be named (`probe-which`).
        Refused: the Hub does not give it (`hub-download`, `download-corrupt`).
    """
    from huggingface_hub import HfApi

    named = hub_name(SCHEME + text.removeprefix(PREFIX))
    assert named is not None
    repo, revision = named.repo_id, named.revision
    info = ask(lambda: HfApi().repo_info(repo, revision=revision, repo_type="dataset"), repo, None)
    commit = str(info.sha)
    names = [f.name for f in list_files(repo, commit, None, "dataset")]
    found = [n for n in names if n == named.folder] or [n for n in names if _has_rows(n) and _is_in(n, named.folder)]
    at = f"@{revision}" if revision else ""
    if not found:
        what = "the data set has no file of rows there: Parquet, JSON lines or a JSON list"
        raise UsageError("path-missing", what, where=show(text), next=f"hf download --repo-type dataset {repo}")
    if len(found) > 1:
        what = f"there are {len(found)} files of rows; name one of them"
        listed = ", ".join(f"{PREFIX}{repo}{at}/{n}" for n in found[:6])
        raise UsageError("probe-which", what, where=show(text), expected=listed + (", ..." if len(found) > 6 else ""))
    path = download(repo, commit, None, found, "dataset") / found[0]
    if not path.is_file():
        raise Refused("hub-download", "the file did not come", where=show(text), next="try again")
    return path


def _has_rows(name: str) -> bool:
    last = PurePosixPath(name).name
    return last.endswith(_ROWS) and not any(fnmatch.fnmatchcase(last, each) for each in _ABOUT)


def _is_in(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")
