"""Entry points are read as `importlib.metadata` reads them, without importing it."""

from __future__ import annotations

import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from converter.plugins import GROUPS, load, named, package

ODD = """
[console_scripts]
rlhf = nobody:run

[rlhf_convert.kernels]
# one = nobody:ONE
; two = nobody:TWO
three=json:dumps
  four   =   json.decoder : JSONDecoder.decode   [extra]

[rlhf_convert.dialects]
five = json
"""


def installed(site: Path, folder: str, text: str, name: str) -> Path:
    info = site / folder
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(text)
    return info


def as_importlib(group: str) -> set[tuple[str, str]]:
    return {(point.name, point.value) for point in entry_points(group=group)}


def as_ours(group: str) -> set[tuple[str, str]]:
    return {(point.name, point.value) for points in named(group).values() for point in points}


def test_ours_are_those_that_importlib_finds() -> None:
    assert {group: as_ours(group) for group in GROUPS} == {group: as_importlib(group) for group in GROUPS}
    assert "lora" in named("rlhf_convert.methods")


def test_odd_lines_are_read_as_importlib_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "odd_lines-1.5.dist-info", ODD, "odd-lines")
    monkeypatch.syspath_prepend(str(tmp_path))
    for group in GROUPS:
        assert as_ours(group) >= {p for p in as_importlib(group) if "json" in p[1]}
    kernels = named("rlhf_convert.kernels")
    assert {"one", "two", "rlhf"} & {*kernels} == set()
    assert load(kernels["three"][0]).__name__ == "dumps"
    assert load(kernels["four"][0]).__qualname__ == "JSONDecoder.decode"
    assert load(named("rlhf_convert.dialects")["five"][0]).__name__ == "json"
    assert package(kernels["three"][0]) == "odd-lines 1.5"


@pytest.mark.parametrize(
    "folders", [("same_name-2.0.dist-info", "Same.Name-1.0.dist-info"), ("a-1.dist-info", "b-1.dist-info")]
)
def test_of_two_distributions_of_one_name_the_first_on_the_path_counts(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site, folder in zip(("first", "second"), folders, strict=True):
        text = f"[rlhf_convert.kernels]\n{site} = json:dumps\n"
        installed(tmp_path / site, folder, text, folder.partition("-")[0])
    for site in ("second", "first"):
        monkeypatch.syspath_prepend(str(tmp_path / site))
    assert {n for n, _ in as_ours("rlhf_convert.kernels")} == {n for n, _ in as_importlib("rlhf_convert.kernels")}
    assert "first" in named("rlhf_convert.kernels")
    assert ("second" in named("rlhf_convert.kernels")) is (folders[0] == "a-1.dist-info")


@pytest.mark.parametrize("kind", ["old.egg-info", "archive.zip"])
def test_old_layouts_and_archives_are_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "[rlhf_convert.kernels]\nold = json:dumps\n"
    if kind == "archive.zip":
        with zipfile.ZipFile(tmp_path / kind, "w") as archive:
            archive.writestr("old-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: old\nVersion: 1.5\n")
            archive.writestr("old-1.5.dist-info/entry_points.txt", line)
        monkeypatch.syspath_prepend(str(tmp_path / kind))
    else:
        info = installed(tmp_path, kind, line, "old")
        (info / "METADATA").rename(info / "PKG-INFO")
        monkeypatch.syspath_prepend(str(tmp_path))
    (point,) = named("rlhf_convert.kernels")["old"]
    assert load(point).__name__ == "dumps"
    assert package(point) == "old 1.5"
    assert "lora-merge" in named("rlhf_convert.kernels")
