"""Several breakages of one folder at once, folders typed in every way, and what a repair makes of them."""

from __future__ import annotations

import json
import random
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from breakages.adapters import ADAPTERS
from breakages.models import CONFIGS, FILES
from converter.cli import main
from doctor_walk import code_of, expect_loaded, listing

KINDS = {"model": FILES, "whole": CONFIGS, "reward": CONFIGS, "adapter": ADAPTERS}
COVERS = {
    "weights-wrapped",
    "architecture-head", "config-refused", "quantised-incomplete",
    "names-of-a-trainer", "fsdp-flat", "no-tensors", "weights-missing", "weights-alone", "config-missing",
    "config-unreadable", "config-unreadable-list", "pickle-names", "pickled-weights", "torch-not", "torch-zip",
    "pickle-malformed", "safetensors-header-huge", "input-not-a-file", "adapter-empty", "adapter-config-missing",
    "adapter-config", "config-unreadable-adapter", "peft-type-unsupported",
    "peft-type-unmergeable", "adapter-empty-twin",
    "index-malformed", "git-lfs-pointer", "names-wrapped", "names-doubled", "lora-unmerged", "shard-missing",
    "safetensors-header", "safetensors-not", "file-truncated", "input-outside", "format-missing", "adapter-keys-named",
    "no-op", "lora-alpha-zero", "adapter-half", "head-named-otherwise", "layers-missing",
    "adapter-field-unsupported", "family-unknown", "adapter-named-otherwise", "adapter-task-unknown",
    "adapter-files-unread", "adapter-inconsistent", "adapter-untargeted",
}  # fmt: skip
"""Breakages that take away what others would be seen by."""

TOUCHED = {
    "the head": ("head", "labels", "normaliser", "architecture-openrlhf", "names-of"),
    "the pad token": ("pad-", "normaliser", "architecture-openrlhf"),
    "the class": (
        "architecture", "normaliser", "output-embedding", "vocabulary", "head-dialect", "heads", "labels", "tensors-",
    ),
    "the index": ("index", "weight-sets", "shard-missing"),
    "the adapter's tensors": (
        "adapter-shape", "adapter-rank", "adapter-targets", "adapter-incomplete", "adapter-unexpected",
        "adapter-unmatched", "adapter-bias", "adapter-tokens", "vocab-mismatch",
    ),
}  # fmt: skip
"""What a breakage changes, by the first letters of its key: of two that change one thing, one hides the other."""

OF_A_MERGE = {"adapter-field-unknown", "adapter-field-unsupported", "adapter-base-moved", "vocab-mismatch"}
"""Errors of merging, which a repaired adapter may have: PEFT loads it."""


def touched(key: str) -> set[str]:
    return {what for what, starts in TOUCHED.items() if key.startswith(starts)}


@pytest.mark.parametrize(
    ("inside", "typed", "out"),
    [
        (".", "./my rm's", "./my rm's-fixed"),
        (".", "my rm's/", "my rm's-fixed"),
        (".", "{abs}", "{abs}-fixed"),
        (".", "./my rm's/model.safetensors", "./my rm's-fixed"),
        ("my rm's", ".", "../my rm's-fixed"),
        ("my rm's", "./", "../my rm's-fixed"),
        ("my rm's", "model.safetensors", "../my rm's-fixed"),
        ("my rm's/sub", "..", "../../my rm's-fixed"),
    ],
)
def test_however_a_folder_is_typed_the_command_writes_beside_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], inside: str, typed: str, out: str
) -> None:
    folder = shutil.copytree(here.parent / "sound" / "reward", here / "my rm's")
    (folder / "sub").mkdir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    monkeypatch.chdir(here / inside)
    typed, out = typed.format(abs=folder), out.format(abs=folder)
    assert main(["doctor", typed]) == 1
    (command,) = [x for x in capsys.readouterr().out.splitlines() if "rlhf-convert " in x]
    words = shlex.split(command.removeprefix("Next:"))
    assert words[3] == out
    assert main(words[1:]) == 0
    expect_loaded(here / "my rm's-fixed")
    assert main(["doctor", typed]) == 1
    assert f"{shlex.quote(out)[:-1]}-2" in capsys.readouterr().out  # the first is there


def test_a_name_that_begins_with_a_dash_is_no_option_in_the_next_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(here.parent / "sound" / "whole", here / "-rm")
    CONFIGS["architecture-wrapper"].change(folder)
    assert main(["doctor", "--", "-rm"]) == 1
    assert "repair ./-rm ./-rm-fixed" in capsys.readouterr().out


def chosen(seed: int) -> tuple[str, list[str]]:
    """A sound folder's name, and two to four breakages that do not hide one another."""
    draw = random.Random(seed)
    good = draw.choice(list(KINDS))
    table = KINDS[good]
    fits = [k for k, b in table.items() if b.good == good and k not in COVERS and not b.options and b.ends != "values"]
    first = draw.choice([k for k, b in table.items() if b.good == good and not b.options and b.ends != "values"])
    keys = [first]
    for key in draw.sample(fits, len(fits)):
        if len(keys) <= draw.randint(1, 3) and not any(touched(key) & touched(k) or key == k for k in keys):
            keys.insert(0, key)
    return good, keys


def check(seed: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, keys = chosen(seed)
    folder = shutil.copytree(here.parent / "sound" / good, here / "it")
    done = []
    for key in keys:
        try:
            KINDS[good][key].change(folder)
        except (OSError, KeyError, ValueError):
            continue  # what it breaks is gone
        done.append(key)
    capsys.readouterr()
    code = main(["doctor", "./it", "--json"])
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code in (0, 1), (keys, value)
    findings = value["findings"]
    seen = [f["code"] for f in findings]
    assert len(seen) == len(set(seen)), (keys, seen)
    if keys[-1] not in COVERS:
        missing = {code_of(k) for k in done} - set(seen)
        assert missing == set(), (done, seen)
    else:
        assert seen, keys
    for each in findings:
        assert each["next"] or each["severity"] == "cosmetic"
    before = listing(here)
    code = main(["repair", "./it", "./out", "-q"])
    assert code in (0, 2, 3), keys
    capsys.readouterr()
    if not (here / "out").exists():
        assert listing(here) == before
        return
    assert code == 0
    assert main(["doctor", "./out", "--json"]) in (0, 1)
    after = json.loads(capsys.readouterr().out)["findings"]
    assert [f["code"] for f in after if f["severity"] == "error" and f["code"] not in OF_A_MERGE] == [], (keys, after)
    expect_loaded(here / "out", with_others=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(16))
def test_of_several_breakages_each_is_named_once_and_repair_fixes_or_writes_nothing(
    seed: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(seed, here, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(16, 216))
def test_of_many_more_breakages_each_is_named_once_and_repair_fixes_or_writes_nothing(
    seed: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(seed, here, capsys)
