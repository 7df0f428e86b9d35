"""No token in what is printed: tracebacks, logs and other libraries' words may quote one."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from pathlib import Path

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}", re.ASCII)
"""Source: https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/_login.py"""

_OF_STORES = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-Signature|Signature|sig)"
    r"=[^&\s\"']+",
    re.ASCII,
)
"""Key ids of S3, and what signs an address."""

_SHORTEST = 8
"""Characters of the shortest text that is taken for a token: `--token x` shall not blot every x."""


def without_secrets(text: str, *secrets: str) -> str:
    """A text in which tokens are stars: those given, of the command line, of the environment, of the client's file."""
    for secret in sorted({*secrets, *_known()}, key=len, reverse=True):
        for form in (secret, secret.encode("unicode_escape").decode("ascii")):
            if len(form) >= _SHORTEST and form in text:
                text = text.replace(form, "***")
    return _OF_STORES.sub("***", _TOKEN.sub("***", text))


def words_without_token(words: list[str]) -> list[str]:
    """A command line without `--token`: the next run finds the token in the environment, or is given it again."""
    kept, skip = [], False
    for word in words:
        if skip or word.startswith("--token="):
            skip = False
        elif word == "--token":
            skip = True
        else:
            kept.append(word)
    return kept


_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_CLIENT_SECRET",
)  # fmt: skip


def _known() -> list[str]:
    found = [os.environ.get(name) for name in _VARIABLES]
    words = sys.argv[1:]
    found += [b for a, b in itertools.pairwise(words) if a == "--token"]
    found += [w.partition("=")[2] for w in words if w.startswith("--token=")]
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import constants

        with contextlib.suppress(OSError, UnicodeError):
            found.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8"))
    return [each.strip() for each in found if each and each.strip()]
