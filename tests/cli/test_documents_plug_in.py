"""The pages on recipes and plug-ins: their recipe is valid, their plug-in works as installed there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import oracle
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


def blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / "docs" / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def block(language: str, word: str) -> str:
    """The block of the page on plug-ins that has a word in it."""
    return next(b for b in blocks("plug-ins.md", language) if word in b)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FIXTURES / "tiny-qwen2-base", tmp_path / "tiny-qwen2-base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_is_valid() -> None:
    (text,) = blocks("recipes.md", "yaml")
    given = {"first": InputSpec("./style"), "second": InputSpec("./facts")}
    check(parse_recipe(text.encode(), file="recipes.md").with_inputs(given))


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's converter, installed as the page says."""
    site = tmp_path / "site"
    info = site / "your_package-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "your_package.py").write_text(block("python", "StripPrefix"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n")
    points = block("toml", "strip-prefix").replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")
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
