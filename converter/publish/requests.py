"""Requests that write to the Hub: repeated where that may help, the client's errors in our words, no token in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from converter.diagnostic import Again
from converter.errors import Refused
from converter.sources.hub.client import blotted
from converter.sources.hub.patience import Patience, heard
from converter.text import show

T = TypeVar("T")


def call(request: Callable[[], T], where: Destination) -> T:
    """A request that may be repeated, with the client's errors in our words."""
    patience = Patience()
    while True:
        try:
            with heard():
                return request()
        except Exception as error:  # the client's own and its transport's
            if not is_passing(error) or not patience.again(error):
                refuse(error, where)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_upload(error: Exception) -> bool:
    """True for what the client says of a large file that could not be sent, whatever the reason below it."""
    return type(error) is RuntimeError and str(error).startswith("Error while uploading")


def is_passing(error: Exception) -> bool:
    """True for what another try may cure: a busy or broken server, a lost connection, a commit that came between."""
    status = _status(error)
    if status is not None:
        return status in (408, 409, 412, 429) or status >= 500
    if _is_of_upload(error):
        return True  # another try gets new addresses to send to
    names = {c.__name__ for c in type(error).__mro__}
    # JSONDecodeError: an answer that came broken.
    passing = {"TransportError", "HTTPError", "ConnectionError", "TimeoutError", "RemoteProtocolError"}
    return bool(names & {*passing, "JSONDecodeError", "UnicodeDecodeError"})


_REASONS = {
    401: ("hub-token", "the token is not valid", "hf auth login, or set HF_TOKEN"),
    403: ("hub-forbidden", "the token may not write there", "make one that may, or push to a repository of yours"),
    404: ("hub-missing", "there is no such repository or revision, or the token does not open it", None),
    412: ("hub-moved", "somebody else commits to it at the same time", "run the same command again"),
    429: ("hub-busy", "the Hub limits the rate of requests", "wait, and run the same command again"),
}


def refuse(error: Exception, where: Destination, *, sent: bool = False) -> NoReturn:
    """The client's error in our words.

    Args:
        sent: a commit was asked for, so that what the Hub did with it is not known where no answer came.
    """
    status = _status(error)
    text = blotted(str(error).strip().partition("\n")[0], where.token)
    place = show(where.repo_id)
    if status in _REASONS:
        code, what, advice = _REASONS[status]
        raise Refused(code, what, where=place, got=show(text), next=advice) from None
    if _is_of_upload(error):
        cause = error.__cause__
        why = f"{text} {blotted(str(cause).strip().partition(chr(10))[0], where.token)}" if cause is not None else text
        what = "a file could not be sent; nothing was published"
        raise Refused("hub-upload", what, where=place, got=show(why), next=Again()) from None
    if status is None or status >= 500:
        what = "the Hub can't be reached or does not answer; nothing was published"
        if sent:
            what = "the Hub did not answer when the commit was made: all of it is there, or nothing"
        raise Refused("hub-unreachable", what, where=place, got=show(text), next=Again()) from None
    raise Refused("hub-refused", "the Hub says no", where=place, got=show(text)) from None


@dataclass(frozen=True)
class Destination:
    """Where to push, and how; a branch that is not there is made, from main.

    Attributes:
        removes_stale: weight files of another model that the repository holds go with the same commit.
    """

    repo_id: str
    token: str | None = None
    public: bool = False
    revision: str = "main"
    create_pr: bool = False
    message: str = "Upload with rlhf-convert"
    removes_stale: bool = False
