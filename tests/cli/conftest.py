"""A bash whose `rlhf-convert` costs a twentieth of a second a command, one for all tests of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from served_shell import Shell


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    with Shell() as served:
        yield served
