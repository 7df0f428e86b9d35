"""Every breakage of a sound checkpoint, what doctor says of it, and what its next command, typed as printed, makes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from breakages.adapters import ADAPTERS
from breakages.models import CONFIGS, FILES
from breakages.runs import RUNS
from breakages.scripts import SCRIPTS
from breakages.sound import Breakage, Tensors, whole
from converter.cli import main
from converter.examine.doctor import diagnoses
from doctor_walk import code_of, expect_loaded, listing
from places import RUNS as SAVED

ALL: dict[str, Breakage] = {**FILES, **CONFIGS, **ADAPTERS, **RUNS, **SCRIPTS}
WRITE = ("repair", "convert", "gather", "merge-lora", "reshard", "rm-to-critic", "critic-to-rm")
CAPITALS = re.compile(r"(?<= )(?:DIR|BASE|ADAPTER|DIALECT|RUN|N)\b")

ELSEWHERE = {
    "plug-in-broken": "of what is installed, and of no folder",
    "header-too-large": "of a writer that would make one",
    "dcp-no-masters": "of gather --master",
    "dcp-no-moments": "of the moments of Adam",
    "zero-no-masters": "of gather --master",
    "dcp-adapter-names": "of gather --emit adapter",
    "zero-round-robin": "of gather --master",
    "verl-optimizer": "of the moments of Adam",
    "json-malformed": "of files that are read on the way: doctor names its own as config-unreadable",
    "tensor-twice": "of verbs that read the folder as it is: doctor names such files as weight-sets",
    "adapter-biases-lost": "of an adapter over a base with biases",
    "tied-scale": "of merges into families that scale a tied output",
    "adapter-merge-refused": "of refusals without a diagnosis of their own",
    "adapter-ambiguous": "of a base that has one module under two names",
    "tied-copies-differ": "of merges: doctor names the base's copies as tied-copies",
    "resume-on": "of --resume-on: tests/sources/test_resume_on.py asks it of every kind of run",
    "megatron-config": "of a Megatron checkpoint: tests/examine/test_doctor_megatron_config.py",
    "input-unreadable": "of files of another user: root, who may run this, can read all",
}
"""Codes that `explain` knows and no folder shows by itself, with what raises them."""


def is_command(step: str) -> bool:
    """True for what a shell runs as it stands."""
    return step.startswith(("rlhf-convert ", "mv ", "cp "))


def broken(here: Path, breakage: Breakage) -> str:
    """A copy of the sound folder, broken, as a user in `here` types it."""
    copy = copied(here, breakage)
    breakage.change(copy)
    return os.path.join(f"./{breakage.name}", breakage.at) if breakage.at else f"./{breakage.name}"


def good_folder(here: Path, breakage: Breakage) -> Path:
    made = here.parent / "sound" / breakage.good
    return made if made.exists() else SAVED / breakage.good


def copied(here: Path, breakage: Breakage) -> Path:
    return Path(shutil.copytree(good_folder(here, breakage), here / breakage.name))


def examined(asked: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Doctor's findings, each of the form that is promised."""
    options = tuple(o.format(here=".", folder=asked) for o in options)
    capsys.readouterr()
    code = main(["doctor", asked, *options, "--json"])
    value = json.loads(capsys.readouterr().out)
    assert code in (0, 1), value
    findings: list[dict[str, Any]] = value["findings"]
    assert code == int(any(f["severity"] != "cosmetic" for f in findings))
    for each in findings:
        assert len(each["evidence"]) <= 3
        assert each["next"] or each["severity"] == "cosmetic", each
        assert set(each["fix"]) <= FIXES
    return findings


FIXES = {
    "fill", "gather", "cast", "remap-head", "split-lora", "choose-weights", "fix-names", "fix-disk-names",
    "fix-adapter-names", "fix-ties", "fix-vocabulary", "fix-labels", "fix-pad-token", "fix-architecture",
    "fix-for-transformers-4",
}  # fmt: skip


def type_it(command: str) -> str | None:
    """Do what a shell does with a command, and say where it wrote; nothing for one that writes nowhere."""
    out = None
    for part in command.split(" && "):
        words = shlex.split(part)
        if words[0] != "rlhf-convert":
            subprocess.run(words, check=True)
            continue
        if words[1] in WRITE:
            out = words[3]
            assert not Path(out).exists()
        assert main(words[1:]) in ((0,) if words[1] in WRITE else (0, 1)), command
    return out


def values_of(folder: Path) -> Tensors:
    oracle = next((p for p in (folder / "oracle.safetensors", folder / "oracle-2.safetensors") if p.exists()), None)
    if oracle is not None:
        every = {n.removeprefix("live/"): v for n, v in load_file(oracle).items()}
        return {n.replace(".default", "").replace(".modules_to_save", ""): v for n, v in every.items()}
    adapter = folder / "adapter_model.safetensors"
    if (folder / "pytorch_model.bin").exists():
        pickled: Tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)  # noqa: TID251
        return pickled
    return load_file(adapter) if adapter.exists() else whole(folder)


def expect_values(made: Path, good: Path, breakage: Breakage) -> None:
    have, want = values_of(made), values_of(good)
    compared = [n for n in have if n in want and breakage.kept(n)]
    assert compared or not any(breakage.kept(n) for n in want), (sorted(have), sorted(want))
    for name in compared:
        assert torch.equal(have[name], want[name].to(have[name].dtype)), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ALL)
def test_what_doctor_says_next_gets_the_user_out(
    key: str, here: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breakage, code = ALL[key], code_of(key)
    asked = broken(here, breakage)
    findings = examined(asked, breakage.options, capsys)
    found = [f for f in findings if f["code"] == code]
    assert found, [f["code"] for f in findings]
    step, before = found[0]["next"], listing(here)
    if breakage.ends == "fixed":
        for option, value in breakage.fill:
            command, cut, _ = step.partition(f" with {option} and ")
            assert cut, step
            step = f"rlhf-convert {command.removeprefix('rlhf-convert ')} {option} {value}"
        assert is_command(step), step
        assert not CAPITALS.search(step), step
        made = type_it(step) or asked
        after = examined(made, breakage.options[:2] if "--for" in breakage.options else (), capsys)
        assert [f["code"] for f in after if f["severity"] != "cosmetic"] == []
        expect_loaded(Path(made))
        expect_values(Path(made), good_folder(here, breakage), breakage)
    elif breakage.ends == "advice":
        assert not is_command(step) or CAPITALS.search(step), step
    elif breakage.ends == "told":
        assert found[0]["severity"] == "cosmetic"
    else:
        assert found[0]["recoverability"] == "lost"
        assert not is_command(step) or CAPITALS.search(step), step
        if breakage.ends == "values":  # headers show nothing to repair, and nothing is repaired
            assert main(["repair", asked, "./out"]) == 0
            assert listing(here) == before
            return
        for verb in (["repair"], ["convert", "--to", "trl", "--role", "reward"]):
            assert main([verb[0], asked, "./out", *verb[1:]]) == 3, capsys.readouterr()
        assert listing(here) == before


def test_every_code_that_doctor_knows_has_a_breakage_that_shows_it() -> None:
    shown = {code_of(key) for key in ALL}
    redone = {"names-in-memory", "experts-twice", "stale-shards"}
    assert set(diagnoses()) - shown - redone - set(ELSEWHERE) == set()
