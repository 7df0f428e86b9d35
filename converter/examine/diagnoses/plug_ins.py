"""Plug-ins that can't be used: what they know of a folder is not in the verdict."""

from __future__ import annotations

from collections.abc import Iterable

from converter.core.context import Context
from converter.diagnostic import Command
from converter.examine.diagnoses.case import Case, Finding, diagnosis
from converter.plugins import DIAGNOSES, SOURCES, plug_ins
from converter.text import show

_ASKED = (DIAGNOSES, SOURCES)
"""What every examination imports; a broken trainer's dialect or method is named by the verb that asks for it."""


@diagnosis("plug-in-broken")
def plug_in_broken(case: Case, context: Context) -> Iterable[Finding]:
    """An installed plug-in can't be imported, so that the faults or folders that it knows are not looked for: no
    finding of this folder says anything of them. The folder is not at fault; update the package or remove it.
    `rlhf-convert list` shows every plug-in and what importing it says.
    """
    for each in plug_ins(_ASKED, only_broken=True):
        kind = "diagnosis" if each.group == DIAGNOSES else each.kind
        text = f"the {kind} `{show(each.name)}` of {show(each.package)} is left out: {each.fault}"
        yield Finding(code="plug-in-broken", severity="cosmetic", text=text, next=Command("list"))
