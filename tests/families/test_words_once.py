"""A list of names that `families/words.py` or `core/files/names.py` owns is written nowhere else in the package."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import converter
from converter.core.files import names
from converter.families import words
from source_trees import parsed

ROOT = Path(converter.__file__).parent
OWNERS = {"families/words.py", "core/files/names.py"}
NOT_SURE = ("OTHER_INPUT_MODULES", "OTHER_OUTPUT_MODULES")
"""Words that mean other things too: `head`, `output`, `decoder`."""

# Not read here: trainers' facts (a dialect names its own files and heads), the texts of messages that are explained,
# scripts that run in a trainer's environment without this package, and the table of pairs that no class has.
ELSEWHERE = ("dialects/", "examine/explanations/", "examine/verify/probes/", "families/ties.py")


@functools.cache
def owned() -> frozenset[str]:
    """Every name in a list of the one, and every file of the other."""
    lists = [v for k, v in vars(words).items() if k.isupper() and isinstance(v, tuple) and k not in NOT_SURE]
    files = [v for k, v in vars(names).items() if k.isupper() and isinstance(v, str)]
    return frozenset((*files, words.PEFT_PREFIX, *(w for each in lists for w in each)))


def copies(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """Literals with two or more of the owned names: in a tuple, list or set, or as alternatives of a pattern."""
    known = owned()
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            given = [e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "|" in node.value:
            given = [w.replace("\\", "") for w in re.split(r"[|()^$?:]+", node.value)]
        else:
            continue
        found = sorted({*given} & known)
        if len(found) > 1:
            yield node.lineno, found


MODULES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if "_shipped" not in p.parts)


@pytest.mark.parametrize("module", [m for m in MODULES if m not in OWNERS and not m.startswith(ELSEWHERE)])
def test_no_module_has_a_list_of_its_own(module: str) -> None:
    assert [*copies(parsed(ROOT / module))] == []


@pytest.mark.parametrize(
    "source",
    [
        'X = ("lm_head.weight", "embed_out.weight")',
        'X = frozenset({"embed_tokens", "wte"})',
        'X = ["value_head.bin", "value_head.pt", "other"]',
        'if name in ("config.json", "adapter_config.json"): pass',
        'X = re.compile(r"(?:^|\\\\.)(?:_orig_mod|_fsdp_wrapped_module)\\\\.")',
        'X = "lora_A|lora_B"',
    ],
)
def test_a_copy_is_seen(source: str) -> None:
    assert len([*copies(ast.parse(source))]) == 1


@pytest.mark.parametrize(
    "source", ['X = ("lm_head.weight",)', 'X = ("score", "of a game")', 'X = "a sentence: lora_A"']
)
def test_one_name_alone_is_no_list(source: str) -> None:
    assert [*copies(ast.parse(source))] == []
