"""`explain CODE`: every code that a refusal, a check, a note or a finding can print is explained."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import converter
import source_trees
from converter.cli import VERBS, main
from converter.diagnostic import parts
from converter.examine.doctor import diagnoses
from converter.examine.explanations.codes import codes
from converter.examine.explanations.log import MESSAGES
from converter.recipe.verbs.explain import explained
from source_trees import within

PACKAGE = Path(converter.__file__).parent
TYPES = (
    "ConvertError",
    "UsageError",
    "Refused",
    "VerificationFailed",
    "Failed",
    "Bug",
    "BrokenCheckpoint",
    "Fault",
    "Finding",
    "Diagnosis",
)
KEBAB = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
NO_CODE = {"_packed", "_unpacked", "diagnosis"}
"""Functions whose `code` is not an error's, and the decorator whose codes are diagnoses anyway."""


def trees() -> dict[Path, ast.Module]:
    return {path: source_trees.parsed(path) for path in sorted(PACKAGE.rglob("*.py"))}


def called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else ""


def takers(parsed: dict[Path, ast.Module]) -> dict[tuple[Path | None, str], int]:
    """Where each function's `code` stands among its positional arguments; private functions are their module's."""
    found: dict[tuple[Path | None, str], int] = {(None, name): 0 for name in TYPES}
    for path, tree in parsed.items():
        for node, _ in within(tree):
            if isinstance(node, ast.FunctionDef) and node.name not in NO_CODE | {"__init__"}:
                names = [a.arg for a in node.args.args]
                if "code" in names:
                    at = names.index("code") - (names[0] in ("self", "cls"))
                    found[path if node.name.startswith("_") else None, node.name] = at
    return found


def strings(node: ast.AST) -> Iterator[str]:
    """The strings that a value can be: of both sides of a choice, and of all of a table's cells."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*strings(node.body), *strings(node.orelse))
    elif isinstance(node, ast.BoolOp):
        yield from (s for v in node.values for s in strings(v))
    elif isinstance(node, ast.Tuple | ast.Dict):
        children = node.elts if isinstance(node, ast.Tuple) else node.values
        yield from (s for child in children for s in strings(child))


def names_in(node: ast.AST) -> list[str]:
    """Variables that a value can be; a choice's condition is none."""
    if isinstance(node, ast.IfExp):
        return [*names_in(node.body), *names_in(node.orelse)]
    return [node.id] if isinstance(node, ast.Name) else []


def assigned(tree: ast.AST, name: str) -> Iterator[str]:
    """What a name is given in a function or a module: a string, or codes of a table that is read there."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.For) else []
        if not any(isinstance(t, ast.Name) and t.id == name for each in targets for t in ast.walk(each)):
            continue
        value = node.value if isinstance(node, ast.Assign) else node.iter  # type: ignore[attr-defined]
        yield from strings(value) if isinstance(node, ast.Assign) else ()
        yield from (f"*{n.id}" for n in ast.walk(value) if isinstance(n, ast.Name))


@functools.cache
def codes_in_the_source() -> dict[str, str]:
    """Every code that a call can be given, with where."""
    parsed = trees()
    known = takers(parsed)
    found: dict[str, str] = {}
    for path, tree in parsed.items():
        tables = {
            t.id: list(strings(node.value))
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            for t in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(t, ast.Name)
        }
        for call, around in within(tree):
            if not isinstance(call, ast.Call):
                continue
            at = known.get((path, called(call)), known.get((None, called(call))))
            given = [k.value for k in call.keywords if k.arg == "code"]
            if at is None or not (given or len(call.args) > at):
                continue
            value = given[0] if given else call.args[at]
            for each in values_of(value, around, tables):
                found[each] = f"{path.relative_to(PACKAGE)}:{call.lineno}"
    return found | dict.fromkeys(("usage", "interrupted", "bug", "system"), "cli/__init__.py")


def values_of(value: ast.expr, around: tuple[ast.AST, ...], tables: dict[str, list[str]]) -> Iterator[str]:
    """The codes that a value can be, by itself, by the functions around it and by the module's tables."""
    direct, names = list(strings(value)), names_in(value)
    values = list(direct)
    for name in names:
        values += tables.get(name, ())
        for scope in around[1:]:
            local = list(assigned(scope, name))
            values += [v for v in local if not v.startswith("*")]
            values += [v for n in local if n.startswith("*") for v in tables.get(n[1:], ())]
    yield from (each for each in values if KEBAB.fullmatch(each) and (direct or "-" in each))


def test_the_collector_sees_codes_of_every_way_in_which_they_are_raised() -> None:
    found = codes_in_the_source()
    direct, local, table, helper, choice = "link-changed", "tensors-lost", "hub-busy", "vocabulary-trim", "no-space"
    assert {direct, local, table, helper, choice, "fsdp-rank-files", "moments-order", "drift-rounding"} <= set(found)
    assert len(found) > 350


def test_every_code_that_a_user_can_see_is_explained() -> None:
    unexplained = {code: where for code, where in codes_in_the_source().items() if explained(code) is None}
    assert not unexplained


def test_no_code_is_explained_that_nothing_prints() -> None:
    assert set(codes()) <= set(codes_in_the_source())
    assert not set(codes()) & set(diagnoses()), "a diagnosis explains itself"


def test_every_flag_of_every_command_that_is_advised_exists(capsys: pytest.CaptureFixture[str]) -> None:
    advice = [text for each in codes().values() for text in (each.text, str(each.next or ""))]
    advice += [text for message in MESSAGES for text in (message.text, *map(str, parts(message.next)))]
    asked: set[tuple[str, str]] = set()
    for text in advice:
        for command in re.findall(r"rlhf-convert [^;,:.']*(?:\.[^ ][^;,:.']*)*", text):
            verb = command.split()[1]
            if verb not in VERBS:
                continue  # "rlhf-convert knows", "rlhf-convert streams"
            asked |= {(verb, flag) for flag in re.findall(r"--[a-z-]+", command)} | {(verb, "--help")}
    flags: dict[str, set[str]] = {}
    for verb in sorted({verb for verb, _ in asked}):
        assert main([verb, "--help"]) == 0, verb
        flags[verb] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert not {(v, f) for v, f in asked if f not in flags[v]}
    for verb in set(VERBS) - set(flags):
        assert main([verb, "--help"]) == 0
        flags[verb] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    others = {"--gradient_checkpointing", "--local-dir", "--tensor-parallel-size", "--max-lora-rank", "--quantization"}
    others |= {"--is-embedding", "--finetune", "--no-load-optim", "--no-load-rng", "--exit-on-missing-checkpoint"}
    others |= {"--auto-detect-ckpt-format", "--use-dist-ckpt", "--address"}  # of vLLM, SGLang, Megatron and Ray
    mentioned = {flag for text in advice for flag in re.findall(r"(?<!\S)--[a-z][a-z_-]+", text)}
    assert mentioned - set().union(*flags.values()) <= others


def test_a_refusals_code_prints_what_happened_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "link-changed"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("link-changed\n")
    assert "no longer the one that was there" in " ".join(shown.split())
    assert "-> convert the source again" in shown
    assert main(["explain", "link-changed", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["code"] == "link-changed"
    assert value["next"][0].startswith("convert the source again")


def test_a_code_of_one_word_and_a_name_that_explain_itself_prints_are_codes_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for code in ("usage", "bug", "interrupted", "family", "size-mismatch", "no-weight-file"):
        assert main(["explain", code]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(code + "\n")
        assert "{" not in shown


def test_a_folder_that_is_named_like_a_code_does_not_hide_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    assert main(["explain", "config"]) == 0
    assert capsys.readouterr().out.startswith("config\n")


@pytest.mark.parametrize(
    ("typed", "near"),
    [("link-chnged", "link-changed"), ("vocabulary_trim", ""), ("head-lost", "head-"), ("truncated", "file-truncated")],
)
def test_an_unknown_code_names_near_ones(typed: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["explain", typed])
    captured = capsys.readouterr()
    if near:
        assert code == 2
        assert f"rlhf-convert explain {near}" in captured.err
    else:
        assert code == 0


def test_the_list_of_codes_has_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--json"]) == 0
    listed = set(json.loads(capsys.readouterr().out)["codes"])
    assert set(codes_in_the_source()) <= listed
