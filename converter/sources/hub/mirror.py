"""A repository of the Hub as a folder: every file has its name and its size, and its bytes come when they are read.

The folder is in TMPDIR and has the shape of the Hub's cache, so that it is named by its repository and commit. It is
gone when the process ends; what a killed one left is removed by the next.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path

from converter.core.files import sparse
from converter.core.files.origins import Origin
from converter.errors import Refused
from converter.sources.hub.client import ListedFile, Repository, open_repository
from converter.sources.survey import is_weight_file
from converter.text import show

SMALL = 65_536
"""Bytes of a weight file that is fetched in one piece."""

LARGEST_TEXT = 64 << 20
"""Bytes of a tokenizer or a config, which is fetched in one piece too; what is larger is read where it is needed."""

MOST_RUNS = 1000


@functools.cache
def mirror(repo_id: str, revision: str | None, token: str | None) -> tuple[Path, str]:
    """A folder with the files of a repository, and the commit that it shows.

    Raises:
        Refused: the repository can't be read (`hub-download`, `hub-listing`), or TMPDIR is not ours (`hub-mirror`).
    """
    repository = open_repository(repo_id, revision, token)
    folder = workspace() / ("models--" + repo_id.replace("/", "--")) / "snapshots" / repository.commit
    if not folder.is_dir():  # another name of the same commit
        sparse.folders[str(folder)] = f"hf://{repo_id}@{repository.commit}"
        for file in repository.files:
            _add(folder, file, repository)
    return folder, repository.commit


def _add(folder: Path, file: ListedFile, repository: Repository) -> None:
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    is_text = not is_weight_file(path.name) and path.suffix != ".distcp" and file.size <= LARGEST_TEXT
    is_whole = file.size <= SMALL or is_text
    fetch = functools.partial(repository.read, file)
    origin = Origin(repository.repo_id, repository.commit, file.name, file.sha256, file.blob_id, file.xet_hash)
    sparse.add(sparse.SparseFile(path, file.size, fetch, origin, is_whole=is_whole))


@functools.cache
def workspace() -> Path:
    """This process's own folder. Its name is the same in every run that is alone, so that plans are the same too."""
    base = Path(tempfile.gettempdir()) / f"rlhf-convert-{os.getuid()}"
    try:
        base.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(base)
    except OSError as error:
        raise Refused("hub-mirror", f"nothing can be written there: {error.strerror}", where=show(base)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Refused(
            "hub-mirror", "this is not a folder of yours", where=show(base), next="set TMPDIR to a folder of your own"
        )
    for number in range(MOST_RUNS):
        lock = os.open(base / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        folder = base / str(number)
        if os.path.lexists(folder):  # left by a process that was killed: the lock says that it is gone
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
        atexit.register(_remove)
        return folder
    raise Refused("hub-mirror", f"{MOST_RUNS} runs read from the Hub already", where=show(base))


def bring_texts(folder: Path) -> None:
    """Fetch the files of a folder that are no weights, for a library that opens them by itself."""
    for file in sparse.known():
        if file.is_whole and file.path.parent == folder:
            with file.held(0, file.size):
                pass


def forget() -> None:
    """Remove what this process has read of the Hub; what is asked for next is read anew."""
    _remove()
    if workspace.cache_info().currsize:
        workspace().mkdir(mode=0o700)


def _remove() -> None:
    if workspace.cache_info().currsize:
        shutil.rmtree(workspace(), ignore_errors=True)
    sparse.forget_all()
    mirror.cache_clear()
