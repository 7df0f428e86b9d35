"""Which dialects are installed, ours and strangers', and which of them a trainer's name and version mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from converter.diagnostic import Again, Command
from converter.dialects.spec import FAMILY_CLASSES, Dialect, Role, Serves
from converter.errors import Refused, UsageError
from converter.plugins import DIALECTS, load, named
from converter.text import nearest, show

_ROLES: tuple[Role, ...] = ("reward", "critic", "actor")


@cache
def dialects() -> Mapping[str, Dialect]:
    """Every usable dialect by name, in alphabetical order; one that can't be imported is left out."""
    found: dict[str, Dialect] = {}
    for name, points in sorted(named(DIALECTS).items()):
        for loaded in map(load, points):  # `rlhf-convert list` shows what a stranger's broken plug-in said
            if isinstance(loaded, Dialect) and loaded.name == name:
                found[name] = loaded
    return found


def dialect(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        UsageError: there is none (`unknown-dialect`).
    """
    known = dialects()
    if name not in known:
        near = nearest(name, known)
        raise UsageError(
            "unknown-dialect",
            f"no dialect is named `{show(name)}`",
            expected=", ".join(known),
            next=f"did you mean `{near[0]}`?" if near else Command("list"),
        )
    return known[name]


@dataclass(frozen=True)
class Target:
    """What is written: a dialect in a role, for one version of a trainer."""

    dialect: Dialect
    role: Role
    serves: Serves
    version: str

    @property
    def words(self) -> str:
        """`openrlhf 0.11.2`; a trainer without versions by its name alone."""
        return f"{self.serves.trainer} {self.version}".rstrip()

    @property
    def traps(self) -> tuple[str, ...]:
        """What goes wrong with this trainer although the files are right."""
        return (*self.serves.traps, *self.dialect.traps)


def trainers(role: Role | None = None) -> list[str]:
    """Names that `--to` takes, in alphabetical order."""
    return sorted({s.trainer for d in dialects().values() for s in d.serves if role is None or role in s.roles})


def entries_of(trainer: str | None) -> list[Serves]:
    """Everything that is known of a trainer: its entries in all dialects."""
    return [s for d in dialects().values() for s in d.serves if s.trainer == trainer]


def own_classes() -> frozenset[str]:
    """Classes that trainers build on the fly and name in `architectures`; transformers has none of them."""
    rules = [d.config for d in dialects().values()]
    named = {name for each in rules for name in (each.reward, each.critic)}
    return frozenset(n for n in named if n not in FAMILY_CLASSES and "{" not in n)


def probe_of(trainer: str) -> str:
    """The script that runs a trainer's own loader; empty where there is none."""
    return next((s.probe for s in entries_of(trainer) if s.probe), "")


def probed() -> list[str]:
    """Trainers whose loader can be run, in alphabetical order."""
    return sorted({s.trainer for d in dialects().values() for s in d.serves if s.probe})


def target(text: str, role: Role) -> Target:
    """What `--to NAME[@VERSION]` means in a role: a trainer, else a dialect by its own name.

    Raises:
        UsageError: no such trainer (`unknown-trainer`), a version outside those known (`trainer-version`).
        Refused: the trainer has no such role (`trainer-role`), can't use such a model (`trainer-unusable`), or the
            dialect is only read (`dialect-refused`).
    """
    name, at, version = text.partition("@")
    offered = [(d, s) for d in dialects().values() for s in d.serves if s.trainer == name]
    if not offered:
        return _by_dialect(name, role, version if at else "")
    in_role = [(d, s) for d, s in offered if role in s.roles]
    if not in_role:
        roles = ", ".join(r for r in _ROLES if any(r in s.roles for _, s in offered))
        what = f"{show(name)} has no {role} that is read from a folder"
        raise Refused("trainer-role", what, expected=f"--role {roles}")
    chosen, serves, said = _of_version(name, version if at else "", in_role)
    if serves.refused or chosen.refused:
        raise Refused("trainer-unusable", serves.refused or chosen.refused, where=f"{name} {said}".rstrip())
    return Target(chosen, role, serves, said)


def _by_dialect(name: str, role: Role, version: str) -> Target:
    known = dialects()
    if name not in known or version:
        near = nearest(name, [*trainers(), *known])
        raise UsageError(
            "unknown-trainer",
            f"no trainer is named `{show(name)}`",
            expected=", ".join(trainers(role)),
            next=f"did you mean `{near[0]}`?" if near else Command("list"),
        )
    found = known[name]
    if found.refused or not found.writable:
        what = found.refused or f"{found.about}: it is read, and not written, as no trainer begins with it"
        raise Refused("dialect-refused", what, where=name, expected=", ".join(trainers(role)))
    if found.head_of(role) is None:
        raise Refused("trainer-role", f"{name} has no {role}", expected=", ".join(trainers(role)))
    serves = next((s for s in found.serves if role in s.roles and not s.refused), Serves(name, (role,), labels=True))
    return Target(found, role, serves, serves.until)


def spoken(text: str) -> list[Dialect]:
    """The dialects that a name means for reading: one of its own, else those that a trainer has or had.

    Raises:
        UsageError: neither (`unknown-trainer`).
    """
    name, _, version = text.partition("@")
    known = dialects()
    if name in known:
        return [known[name]]
    pairs = [(d, s) for d in known.values() for s in d.serves if s.trainer == name and not s.refused]
    if version:
        pairs = [(d, s) for d, s in pairs if s.until and numbers(s.since) <= numbers(version) <= _last(s.until)]
    found = {d.name: d for d, s in pairs if d.actor is None}
    if not found:
        near = nearest(name, [*trainers(), *known])
        raise UsageError(
            "unknown-trainer",
            f"no trainer or dialect that is read is named `{show(text)}`",
            expected=", ".join(known),
            next=f"did you mean `{near[0]}`?" if near else Command("list"),
        )
    return list(found.values())


def _of_version(name: str, version: str, offered: Iterable[tuple[Dialect, Serves]]) -> tuple[Dialect, Serves, str]:
    """The entry of a version; without one the newest that can be used."""
    ranges = sorted(offered, key=lambda each: numbers(each[1].until))
    if not version:
        usable = [each for each in ranges if not each[1].refused]
        chosen, serves = (usable or ranges)[-1]
        return chosen, serves, serves.until
    for chosen, serves in ranges:
        if serves.until and numbers(serves.since) <= numbers(version) <= _last(serves.until):
            return chosen, serves, version
    known = ", ".join(f"{s.since} to {s.until}" for _, s in ranges if s.until)
    raise UsageError(
        "trainer-version",
        f"{show(name)} {show(version)} is not a version that is known here",
        expected=known or f"{name} without a version",
        next=Again(("--to", name + (f"@{ranges[-1][1].until}" if ranges[-1][1].until else ""))),
    )


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: `0.5.4` as (0, 5, 4), `0.3.6.post1` as (0, 3, 6)."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition(".post")[0]))


def _last(version: str) -> tuple[int, ...]:
    """The end of a range: `0.10` holds every 0.10.x."""
    return (*numbers(version), 1 << 30)
