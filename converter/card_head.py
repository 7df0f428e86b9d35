"""What a card says of a head and of the trainer that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import ConvertError

if TYPE_CHECKING:
    from converter.dialects.known import Target

TOLD = frozenset(
    {
        "head", "head-base", "dialect-from", "dialect-to", "head-folded", "head-carried", "head-embedded", "head-units",
        "head-unembedded", "head-bias-zero", "normaliser-folded", "lm-head", "part",
    }
)  # fmt: skip
"""Codes of a receipt's notes that say where a head is from, and in whose names it is written."""


def head_notes(receipt: Mapping[str, Any]) -> list[str]:
    """The receipt's words about the head."""
    notes = receipt.get("notes")
    rows = [n for n in notes if isinstance(n, list) and len(n) == 3] if isinstance(notes, list) else []
    return [str(n[2]) for n in rows if n[0] == "info" and n[1] in TOLD]


def made_for(receipt: Mapping[str, Any]) -> Target | None:
    """The trainer and the role that the recipe's last `remap-head` names; None where there is none that is known."""
    from converter.dialects.known import target

    recipe = receipt.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    listed = steps if isinstance(steps, list) else []
    found = [s["remap-head"] for s in listed if isinstance(s, dict) and "remap-head" in s]
    fields = found[-1] if found and isinstance(found[-1], dict) else {}
    to, role = fields.get("to"), fields.get("role")
    if not isinstance(to, str) or role not in ("reward", "critic", "actor"):
        return None
    try:
        return target(to, role)
    except ConvertError:
        return None


def launch_lines(aim: Target, repo_id: str) -> list[str]:
    """The trainer's own line with the repository in it, and what goes wrong although the files are right."""
    if not aim.serves.launch:
        return []
    line = aim.serves.launch.replace("{out!r}", repr(repo_id)).replace("{out}", repo_id)
    return [line, *(f"# {trap}" for trap in aim.traps)]
