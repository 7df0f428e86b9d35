"""Broken folders, and what users type of them: every verb that reads or writes one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from breakages.adapters import ADAPTERS
from breakages.models import CONFIGS, FILES
from breakages.runs import RUNS
from breakages.scripts import SCRIPTS
from breakages.sound import Breakage, make_sound
from converter.diagnostic import quoted
from places import RUNS as SAVED

BREAKAGES: Mapping[str, Breakage] = {**FILES, **CONFIGS, **ADAPTERS, **RUNS, **SCRIPTS}

VERBS: Mapping[str, str] = {
    "inspect": "inspect {it}",
    "doctor": "doctor {it}",
    "doctor-for": "doctor {it} --for openrlhf",
    "verify": "verify {it}",
    "verify-for": "verify {it} --for trl --role reward",
    "verify-against": "verify {base} --against {it}",
    "diff": "diff {it} {base}",
    "repair": "repair {it} ./out",
    "reshard": "reshard {it} ./out --dtype bf16",
    "gather": "gather {it} ./out",
    "gather-merged": "gather {it} ./out --emit merged",
    "gather-adapter": "gather {it} ./out --emit adapter",
    "merge": "merge-lora {it} ./out",
    "merge-base": "merge-lora {it} ./out --base {base}",
    "convert-reward": "convert {it} ./out --to openrlhf --role reward",
    "convert-critic": "convert {it} ./out --to verl --role critic",
    "convert-actor": "convert {it} ./out --to trl --role actor",
    "convert-base": "convert {it} ./out --to trl --role reward --base {base}",
    "critic": "rm-to-critic {it} ./out --to openrlhf",
    "rm": "critic-to-rm {it} ./out --to trl",
    "run-reshard": "run reshard-bf16 ./out --input source={it}",
    "run-merge": "run merge-reward-lora ./out --input adapter={it}",
    "push": "push {it} me/model",
}
"""What is typed of a folder, by a name of its own."""


@dataclass(frozen=True)
class Place:
    """A folder in which commands are typed, and how its users name what they type of."""

    folder: Path
    it: str
    base: str

    def line(self, verb: str) -> str:
        """The command line of one of `VERBS`."""
        return "rlhf-convert " + VERBS[verb].format(it=quoted(self.it), base=quoted(self.base))


class Places:
    """Broken folders, each made once below a folder, and copied for each command that may change it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make_sound(root / "sound")

    def broken(self, key: str) -> Place:
        """A broken folder with what lies beside it."""
        breakage, here = BREAKAGES[key], self.root / "made" / key
        asked = f"./{breakage.name}"
        if not here.exists():
            # As tests of doctor make it: below a folder beside `sound`.
            here.mkdir(parents=True)
            (here.parent / "sound").exists() or os.symlink(self.root / "sound", here.parent / "sound")
            made = self.root / "sound" / breakage.good
            copy = shutil.copytree(made if made.exists() else SAVED / breakage.good, here / breakage.name)
            breakage.change(Path(copy))
        return Place(here, f"{asked}/{breakage.at}" if breakage.at else asked, str(self.root / "sound" / "whole"))
