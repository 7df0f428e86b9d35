"""The house: few rooms, few layers, short files, no circle of imports, a top level that the README can explain."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grimp
import pytest

from source_trees import functions, parsed, within

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "converter"
CONTRACTS: dict[str, dict[str, Any]] = {
    each["name"]: each
    for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}

LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 71
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "README.zh-CN.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("constraints.txt", "converter", "recipes", "tests", "fixtures", "tools", "docs", ".ci", ".gitignore"),
    *("Dockerfile", ".dockerignore"),
    *("action.yml", ".pre-commit-hooks.yaml"),  # where GitHub and pre-commit look for them
}


@functools.cache
def tracked() -> tuple[str, ...]:
    """Files of the repository; where there is none, as in an sdist, those that lie here."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return tuple(f for f in done.stdout.splitlines() if (ROOT / f).exists())


def sources(*folders: str) -> list[Path]:
    return [ROOT / f for f in tracked() if f.endswith(".py") and f.partition("/")[0] in folders]


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in arrows.get(node, ()):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            at = stack.index(node)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in arrows:
        if node not in number:
            visit(node)
    return sorted(found)


@functools.cache
def imports() -> dict[str, frozenset[str]]:
    """Which module imports which, in functions and for types too."""
    graph = grimp.build_graph("converter", exclude_type_checking_imports=False, cache_dir=None)
    return {each: frozenset(graph.find_modules_directly_imported_by(each)) for each in graph.modules}


def siblings(arrows: Mapping[str, Iterable[str]], package: str) -> dict[str, set[str]]:
    """The same arrows between the files and folders of one package."""
    depth = package.count(".") + 2
    found: dict[str, set[str]] = {}
    for module, others in arrows.items():
        if module.startswith(package + "."):
            child = ".".join(module.split(".")[:depth])
            there = {".".join(o.split(".")[:depth]) for o in others if o.startswith(package + ".")}
            found.setdefault(child, set()).update(there - {child})
    return found


def packages() -> list[str]:
    return sorted({m.rpartition(".")[0] for m in imports() if "." in m})


def test_circles_are_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]]
    assert circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []
    arrows = {"p.x.one": ["p.y.one"], "p.y.two": ["p.x.two"], "p.x.two": [], "p.y.one": []}
    assert circles(arrows) == []
    assert circles(siblings(arrows, "p")) == [["p.x", "p.y"]]


def test_imports_in_functions_and_for_types_are_counted() -> None:
    deferred = [
        (module, target)
        for path in sources("converter")
        for module in [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")]
        for node, around in within(parsed(path))
        if len(around) > 1 and isinstance(node, ast.ImportFrom) and node.module in imports()
        for target in [node.module]
    ]
    assert len(deferred) > 20
    missed = [
        (module, target)
        for module, target in deferred
        if module in imports() and not any(o == target or o.startswith(target + ".") for o in imports()[module])
    ]
    assert missed == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(imports()) == []


@pytest.mark.parametrize("package", packages())
def test_no_files_or_folders_of_a_package_import_each_other_in_a_circle(package: str) -> None:
    assert circles(siblings(imports(), package)) == []


def test_few_files_lie_at_the_top_of_the_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_folders_are_at_most_three_deep() -> None:
    assert max(len(path.relative_to(PACKAGE).parent.parts) for path in sources("converter")) <= 3


def test_layers_are_at_most_ten_and_name_every_room() -> None:
    layers = CONTRACTS["Dependencies point down only"]["layers"]
    assert len(layers) <= 10
    named = {name.strip(" ()") for layer in layers for name in layer.replace(":", "|").split("|")}
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    files = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert named == rooms | files


def test_no_contract_lists_modules_by_hand() -> None:
    for name, contract in CONTRACTS.items():
        for field in ("source_modules", "forbidden_modules", "modules", "ignore_imports"):
            ours = [m for m in contract.get(field, []) if m.startswith("converter")]
            # Exceptions by room, the child that asks transformers and the callback that is one of transformers'; a list
            # of modules grows with each module.
            assert len(ours) <= 7, f"{name}: {field} lists {ours}"
        assert set(contract.get("ignored_layers", [])) == set()


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources("converter", "tests", "tools")}
    assert {name: n for name, n in long.items() if n > LINES_OF_A_FILE} == {}


def test_no_function_is_longer_than_71_lines() -> None:
    """From `def` to its end."""
    every = [(path, each) for path in sources("converter") for each in functions(path)]
    assert len(every) > 1000
    lines = [(f"{p.relative_to(ROOT)}:{f.name}", (f.end_lineno or f.lineno) - f.lineno + 1) for p, f in every]
    assert [each for each in lines if each[1] > LINES_OF_A_FUNCTION] == []


def test_the_top_level_is_what_the_project_promises() -> None:
    assert sorted({f.partition("/")[0] for f in tracked()} - TOP_LEVEL) == []
    # What must be there; documents come and go by the issue that writes them.
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= set(tracked())


def test_no_test_imports_another_test() -> None:
    tests = {p.stem for p in sources("tests") if p.name.startswith("test_")}
    importing = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("tests")
        if re.search(r"\bimport\b.*\btest_|\bfrom\s+\S*\btest_", path.read_text())  # few: parsing all takes seconds
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.rpartition(".")[2] in tests
    }
    assert importing == set()


def test_tests_lie_in_the_rooms_of_the_package_under_names_of_their_own() -> None:
    tests = [p for p in sources("tests") if p.name.startswith("test_")]
    assert len({p.name for p in tests}) == len(tests)
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    folders = {p.relative_to(ROOT / "tests").parts[0] for p in tests if len(p.relative_to(ROOT / "tests").parts) > 1}
    assert folders - rooms - {"trainers"} == set()


def test_no_stored_run_names_a_folder_of_the_machine_that_made_it() -> None:
    """torch writes the folder of a save into `.metadata`: give it a relative one of the same length."""
    stored = [ROOT / name for name in tracked() if name.endswith(".metadata")]
    assert stored
    assert [p for p in stored if re.search(rb"[^\w./-]/(?:[\w.-]+/){2}", p.read_bytes())] == []
