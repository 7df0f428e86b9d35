"""Outputs that are no folders: `hf://owner/name` on the Hub, `s3://bucket/folder` and its like in a store."""

from __future__ import annotations

from converter.errors import UsageError
from converter.sources.store_names import is_in_store
from converter.text import show

SCHEME = "hf://"

STALE = "hub-stale-weights"


def goes_to_hub(out: str | None) -> bool:
    """True for `hf://owner/name`; `owner/name` alone is a folder."""
    return out is not None and out.startswith(SCHEME)


def is_remote(out: str | None) -> bool:
    """True for an output that is on the Hub or in an object store, and no folder of this machine."""
    return out is not None and (goes_to_hub(out) or is_in_store(out))


def as_loaders_take_it(out: str) -> str:
    """The output as transformers and trainers take it: `owner/name` of one on the Hub, a path that can't be one."""
    if goes_to_hub(out):
        return out.removeprefix(SCHEME).partition("@")[0]
    return out if out.startswith(("/", ".", "~")) else f"./{out}"


def repository(text: str, revision: str) -> tuple[str, str]:
    """Repository and branch of `owner/name`, `owner/name@branch` or `hf://owner/name`, for something to be sent there.

    Raises:
        UsageError: a folder in a repository (`hub-repo-id`), or two branches (`usage`).
    """
    from converter.sources.hub.names import hub_name

    named = hub_name(text) if text.startswith(SCHEME) or "@" in text else None
    if named is None:
        return text, revision
    if named.folder:
        raise UsageError("hub-repo-id", f"{show(text)} is a folder in a repository", expected="owner/name")
    if named.revision and revision not in ("main", named.revision):
        raise UsageError("usage", f"two branches: {show(text)} and --revision {show(revision)}; give one")
    return named.repo_id, named.revision or revision
