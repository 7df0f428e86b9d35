"""What the writer tells of a run while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


class Reporter(Protocol):
    """Hears how a run goes on. Called from several threads."""

    def start(self, total_bytes: int, shards: int) -> None:
        """The run begins; `total_bytes` of weights in `shards` files are to be written."""

    def advance(self, count: int, tensor: str) -> None:
        """`count` more bytes are written; `tensor` is the one being worked on."""

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """A file of `size` bytes is durable; `resumed`: it was there before, and its bytes are in no `advance`."""

    def checking(self, what: str) -> None:
        """Something else than writing goes on: the check of `what`."""


@runtime_checkable
class Estimating(Protocol):
    """A reporter that says how long a run still takes."""

    def computing(self, sizes: Mapping[str, int]) -> None:
        """After `start`: these tensors are computed, with their bytes in the output; all others are copied."""


class Silent:
    """Hears everything and says nothing."""

    def start(self, total_bytes: int, shards: int) -> None:
        """Nothing."""

    def advance(self, count: int, tensor: str) -> None:
        """Nothing."""

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        """Nothing."""

    def checking(self, what: str) -> None:
        """Nothing."""
