"""Options that the verbs share which examine with doctor."""

from __future__ import annotations

from typing import Annotated

import typer

Deep = Annotated[bool, typer.Option("--deep", help="Read values too: NaN, zeros, heads that never moved.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="CODE", help="Leave this one out. Repeatable.", show_default=False),
]
