"""Syntax trees of source files, each parsed once in a process."""

from __future__ import annotations

import ast
import functools
import gc
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The tree of a file; not to be changed."""
    before = gc.isenabled()
    gc.disable()  # a tree is a hundred thousand objects, none of them garbage
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        if before:
            gc.enable()


@functools.cache
def functions(path: Path) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]:
    """Every function of a file, in classes and other functions too."""
    return tuple(n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def within(tree: ast.AST) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node below a tree, each with what is around it: the tree, then the functions that it lies in."""
    waiting: list[tuple[ast.AST, tuple[ast.AST, ...]]] = [(tree, (tree,))]
    while waiting:
        node, around = waiting.pop()
        for child in ast.iter_child_nodes(node):
            inner = (*around, child) if isinstance(child, ast.FunctionDef) else around
            waiting.append((child, inner))
            yield child, inner
