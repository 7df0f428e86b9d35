"""Which trainers `--for` may name, and in which roles each reads a folder."""

from __future__ import annotations

from converter.dialects.known import Target, dialects, target
from converter.dialects.spec import Role

_ROLES: tuple[Role, ...] = ("reward", "critic", "actor")


def is_transformers_4(text: str | None) -> bool:
    """True for `transformers@4` and its versions: a stack of libraries, not a trainer with a loader of its own."""
    name, _, version = (text or "").partition("@")
    return name == "transformers" and (version == "4" or version.startswith("4."))


def roles_of(name: str) -> tuple[Role, ...]:
    """Roles in which a trainer reads folders."""
    found = {r for d in dialects().values() for s in d.serves if s.trainer == name for r in s.roles}
    return tuple(r for r in _ROLES if r in found)


def aim(text: str, role: Role) -> Target:
    """What `--for NAME[@VERSION]` means in a role; see `target`.

    Raises:
        UsageError: a version that is not known (`trainer-version`).
        Refused: a role that the trainer hasn't, or models that it can't use.
    """
    return target("transformers" if is_transformers_4(text) else text, role)
