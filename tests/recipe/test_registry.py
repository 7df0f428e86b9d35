"""Plug-ins are found by entry point, ours and strangers' alike; a broken one harms nobody else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from converter import plugins as registry
from converter.converters import finding as find_converters
from converter.core.tensors import kernel_specs
from converter.errors import UsageError
from converter.sources import finding as find_sources
from oracle.command import run

STRANGER = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar

from converter import Checkpoint, Context, Input


@dataclass(frozen=True)
class DropAll:
    name: ClassVar[str] = "drop-all"
    other: Input
    several: tuple[Input, ...] = ()
    some_number: float = 1.0

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        return checkpoint


NOT_A_CONVERTER = 3
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Installs a module as a distribution of its own, as pip would lay it out."""

    def installed(name: str, source: str, points: dict[str, dict[str, str]]) -> None:
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        text = "".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for g, named in points.items())
        (info / "entry_points.txt").write_text(text)
        monkeypatch.syspath_prepend(str(site))

    clear()
    yield installed
    clear()


def clear() -> None:
    registry._registered.cache_clear()
    find_sources.sources.cache_clear()
    find_converters.find_converter.cache_clear()
    kernel_specs.find.cache_clear()


def test_every_kernel_spec_of_ours_is_registered_under_its_name() -> None:
    specs = {v.name: v for v in vars(kernel_specs).values() if isinstance(v, kernel_specs.KernelSpec)}
    assert specs
    assert {p.name for p in registry.plug_ins([registry.KERNELS])} >= set(specs)
    for name, spec in specs.items():
        assert kernel_specs.find(name) is spec


def test_every_plug_in_of_ours_can_be_imported() -> None:
    found = registry.plug_ins()
    assert {p.name for p in found} >= {"hf", "peft", "merge-lora", "cast"}
    assert [p for p in found if p.fault] == []


def test_a_stranger_s_converter_is_found_by_name(install) -> None:
    install("stranger", STRANGER, {registry.CONVERTERS: {"drop-all": "stranger:DropAll"}})
    assert find_converters.find_converter("drop-all").__module__ == "stranger"


def test_an_unknown_converter_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(UsageError) as caught:
        find_converters.find_converter("merge_lora")
    assert caught.value.code == "unknown-converter"
    assert caught.value.next == "did you mean `merge-lora`?"


def test_a_converter_that_two_packages_register_is_refused_with_both_names(install) -> None:
    install("one", STRANGER, {registry.CONVERTERS: {"drop-all": "one:DropAll"}})
    install("two", STRANGER, {registry.CONVERTERS: {"drop-all": "two:DropAll"}})
    with pytest.raises(UsageError) as caught:
        find_converters.find_converter("drop-all")
    assert caught.value.got == "one 1.0, two 1.0"


def test_a_plug_in_that_can_t_be_imported_is_an_error_of_its_package_and_of_no_other(install) -> None:
    install("broken", "raise RuntimeError('no such luck')", {registry.CONVERTERS: {"broken": "broken:Thing"}})
    with pytest.raises(UsageError, match="no such luck") as caught:
        find_converters.find_converter("broken")
    assert caught.value.where == "broken 1.0"
    assert find_converters.find_converter("merge-lora").name == "merge-lora"


def test_an_entry_point_that_names_no_converter_is_refused(install) -> None:
    install("stranger", STRANGER, {registry.CONVERTERS: {"odd": "stranger:NOT_A_CONVERTER"}})
    with pytest.raises(UsageError, match="is not a converter named `odd`"):
        find_converters.find_converter("odd")


def test_list_shows_a_stranger_s_plug_in_and_marks_a_broken_one(install) -> None:
    install("stranger", STRANGER, {registry.CONVERTERS: {"drop-all": "stranger:DropAll"}})
    install("broken", "import nothing_of_that_name", {registry.SOURCES: {"broken": "broken:Thing"}})
    ran = run("list", "--json")
    assert ran.code == 1
    found = {p["name"]: p for p in json.loads(ran.out)["plug_ins"]}
    assert found["drop-all"] == {
        "kind": "converter",
        "name": "drop-all",
        "target": "stranger:DropAll",
        "package": "stranger 1.0",
        "fault": None,
    }
    assert "nothing_of_that_name" in found["broken"]["fault"]
