"""JSON to a URL that the user gave. What the URL holds is nobody else's: it may be a key, and is never printed."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from converter.errors import UsageError
from converter.text import show
from converter.version import __version__

TIMEOUT = 10.0
"""Seconds that a receiver has."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Whoever is sent elsewhere is not who was named."""

    def redirect_request(self, *_arguments: Any, **_more: Any) -> None:
        """None: the answer is an error."""


def expect_url(url: str | None) -> None:
    """Refuse what is no address.

    Raises:
        UsageError: it is not http or https, or has no host (`post-url`).
    """
    if url is None:
        return
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError("post-url", "--post takes an address", expected="https://HOST/PATH")


def post(url: str, value: Mapping[str, Any], *, timeout: float = TIMEOUT) -> str | None:
    """Send a value; None, or in a few words why it did not arrive, without anything of the URL but its host."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    headers = {"Content-Type": "application/json", "User-Agent": f"rlhf-convert/{__version__}"}
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    address = urllib.parse.urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    request = urllib.request.Request(address, json.dumps(value).encode(), headers, method="POST")  # noqa: S310 - http(s)
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout) as answer:
            answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        return f"{show(host)} answered {error.code}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        words = "no answer in time" if isinstance(reason, TimeoutError) else _plain(reason, url)
        return f"{show(host)}: {words}"
    return None


def _plain(reason: object, url: str) -> str:
    """What went wrong, where that does not repeat the URL."""
    text = show(getattr(reason, "strerror", None) or reason, 120)
    secret = [p for p in urllib.parse.urlsplit(url)[2:4] if len(p) > 1]
    return type(reason).__name__ if any(p in text for p in secret) else text
