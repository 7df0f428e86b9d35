"""The README tells the truth: its screens are what the commands print, its recipe and its plug-in work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
from converter.cli import VERBS
from converter.converters import finding as find_converters
from converter.core.tensors import kernel_specs
from converter.recipe.fields import check
from converter.recipe.recipe import parse_recipe
from converter.shipped import shipped
from converter.sources import finding as find_sources
from converter.sources.opening import InputSpec
from oracle.command import run
from places import REPOSITORY

FIXTURES = shipped("fixtures")
README = (REPOSITORY / "README.md").read_text("utf-8")

VARIES = re.compile(r"[\d.]+ [KMGT]?B free|\d+:\d\d$|\d+ MB memory", re.MULTILINE)
"""Free disk, seconds, and the memory that as many threads as there are cores need."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("tiny-qwen2-base", "tiny-reward-adapter", "tiny-reward-run"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVERY = [b for b in blocks("") if b.startswith("$ rlhf-convert ")]
STORY = [b for b in EVERY if "tiny-reward-run" in b.partition("\n")[0]]
SCREENS = [b for b in EVERY if b not in STORY]


@pytest.mark.parametrize("screen", SCREENS, ids=[s.split()[2] for s in SCREENS])
def test_a_screen_is_what_the_command_prints(here: Path, screen: str) -> None:
    expect(screen)


def expect(screen: str) -> None:
    command, _, expected = screen.partition("\n")
    ran = run(*command.split()[2:])
    shown = ran.out or ran.err
    assert VARIES.sub("…", shown) == VARIES.sub("…", expected)


def test_the_incident_is_told_as_it_happens_and_each_command_is_the_one_printed_before(here: Path) -> None:
    assert [s.split()[2] for s in STORY] == ["doctor", "convert", "verify"]
    for screen, following in zip(STORY, [*STORY[1:], ""], strict=True):
        expect(screen)
        assert following.partition("\n")[0].removeprefix("$ ") in screen


def test_there_are_screens_of_a_merge_of_inspect_and_of_a_refusal() -> None:
    assert [s.split()[2] for s in SCREENS] == ["merge-lora", "inspect", "merge-lora"]


def test_every_verb_is_named_and_every_verb_named_exists() -> None:
    listed = re.findall(r"^- `([a-z]+)[ `]", README, re.MULTILINE)
    assert {*listed, *re.findall(r"rlhf-convert ([a-z][a-z-]+)", README)} <= set(VERBS)
    assert all(f"`{verb}" in README or f"rlhf-convert {verb}" in README for verb in VERBS)


def test_the_recipe_is_valid() -> None:
    (text,) = blocks("yaml")
    given = {"first": InputSpec("./style"), "second": InputSpec("./facts")}
    check(parse_recipe(text.encode(), file="README.md").with_inputs(given))


def test_every_refusal_code_is_one_that_the_code_raises() -> None:
    source = "".join(p.read_text("utf-8") for p in (FIXTURES.parent).rglob("*.py"))
    table = README.partition("Refused by name")[2].partition("## The other verbs")[0]
    codes = re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", re.sub(r"^\|[^|]*\|", "", table, flags=re.MULTILINE))
    assert len(codes) >= 9
    assert [code for code in codes if f'"{code}"' not in source] == []


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The README's converter, installed as the README says."""
    site = tmp_path / "site"
    info = site / "your_package-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "your_package.py").write_text(blocks("python")[0])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n")
    points = blocks("toml")[0].replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(site))
    for cached in (find_converters.find_converter, find_sources.sources, kernel_specs.find):
        cached.cache_clear()
    yield
    find_converters.find_converter.cache_clear()


def test_the_plug_in_is_a_step_of_a_recipe(here: Path, plug_in: None) -> None:
    tensors = oracle.read_tensors(here / "tiny-qwen2-base")
    shutil.copytree(here / "tiny-qwen2-base", here / "wrapped", ignore=shutil.ignore_patterns("model*"))
    oracle.write_tensors(here / "wrapped", {f"module.{name}": t for name, t in tensors.items()})
    (here / "strip.yaml").write_text(
        'version: 1\ninputs: {source: ./wrapped}\nsteps:\n  - strip-prefix: {prefix: "module."}\n'
    )
    ran = run("run", "strip.yaml", "out")
    assert ran.code == 0, ran.err
    assert "27 tensors renamed" in ran.out
    oracle.same_bits(oracle.read_tensors(here / "out"), tensors)
