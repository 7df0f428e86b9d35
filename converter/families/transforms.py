"""One entry of the patterns by which transformers takes a name on disk to a name in memory (see `memory_names`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BACK_REFERENCE = re.compile(r"\\(\d+)")


@dataclass(frozen=True)
class Change:
    """What a load does to values beyond laying tensors end to end, or cutting them, along their rows.

    Attributes:
        dim: along which they are cut or laid end to end.
        permute: the config's part that counts heads, and the targets that are permuted (no name: all of them).
        count: the config's field that counts the tensors that are laid end to end.
    """

    dim: int = 0
    permute: tuple[str, ...] = ()
    count: str = ""


@dataclass(frozen=True)
class Transform:
    """One entry of the conversion mapping.

    Attributes:
        kind: `rename`, `group` (its first pattern must have been met before the others count), `shift` (adds to a
            number in the name) or `convert` (the values change too).
        pattern: one named group for each alternative.
        targets: what takes the match's place; of a `convert`, all tensors that come of it.
        scope: path of the sub-model that it belongs to, below the backbone's prefix; None for the model itself.
        base: the backbone's prefix.
    """

    kind: str
    pattern: re.Pattern[str]
    targets: tuple[str, ...]
    offset: int = 0
    operations: str = ""
    scope: str | None = None
    base: str = ""
    change: Change = Change()

    def apply(self, name: str, met: set[int]) -> str | None:
        """The new name, or None where the pattern does not match; `met` remembers groups that have begun."""
        found = self.found(name)
        if found is None:
            return None
        head, index, match = found
        rest, first = name[len(head) :], self.pattern.groupindex[f"g{index}"]
        if self.kind == "group":
            if index == 0:
                met.add(id(self))
            elif id(self) not in met:
                return None
        target = self.targets[index if self.kind == "group" else 0]
        if self.kind == "shift":
            target = target.replace(r"\1", str(int(match[first + 1]) + self.offset))
        else:
            target = _BACK_REFERENCE.sub(lambda back: match[first + int(back[1])], target)
        return head + rest.replace(match[0], target, 1)

    def found(self, name: str) -> tuple[str, int, re.Match[str]] | None:
        """What leads to the sub-model, which alternative of the pattern matches the rest of the name, and the match."""
        head = self.head(name)
        match = None if head is None else self.pattern.search(name[len(head) :])
        if head is None or match is None:
            return None
        group = next(g for g, text in match.groupdict().items() if text is not None)
        return head, int(group[1:]), match

    def head(self, name: str) -> str | None:
        """The part of the name that leads to the sub-model, with or without the backbone's prefix."""
        if self.scope is None:
            return ""
        scope = f"{self.scope}." if self.scope else ""
        whole = (f"{self.base}." if self.base else "") + scope
        return next((head for head in (whole, scope) if name.startswith(head)), None)
