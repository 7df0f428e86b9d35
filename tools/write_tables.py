"""Write every generated table of the documents, between its marks, and what the shipped PEFT methods declare.

    python tools/write_tables.py              writes the tables
    python tools/write_tables.py --screens    renews the screens too, from real runs
    python tools/write_tables.py --check      writes nothing; exit code 1 where a table is not what it should be

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from screens import PAGES, REPOSITORY, renewed_page, workplace

DOCUMENTS = tuple(sorted({*PAGES, "SECURITY.md", "CONTRIBUTING.md", "tests/benchmarks/README.md", "recipes/README.md"}))

_MARKED = re.compile(r"^<!-- generated: ([\w-]+) -->\n(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def failures() -> str:
    """The catalogue of failures and the codes that show them."""
    from converter.examine.diagnoses.catalogue import table

    return "\n".join(table())


def coverage() -> str:
    """How much of the catalogue doctor sees."""
    from converter.examine.diagnoses.catalogue import ROWS, covered

    return f"`doctor` recognises {len(covered())} of the {len(ROWS)} failures; the others leave no trace in files."


def dialect_matrix() -> str:
    """What becomes of a head between any two dialects."""
    from converter.converters.heads.matrix import markdown

    return markdown().rstrip()


def trainer_matrix() -> str:
    """What trainers' own loaders say: written by a run of the trainers."""
    return (REPOSITORY / "tests" / "trainers" / "matrix.md").read_text("utf-8").rstrip()


def reshard_pairs() -> str:
    """What DeepSpeed loaded on other ranks: written by a run of it."""
    return (REPOSITORY / "tests" / "runs" / "zero" / "pairs.md").read_text("utf-8").rstrip()


def trainers() -> str:
    """The trainers that `--to` and `--for` know, with the roles and versions of each."""
    from converter.dialects.known import dialects

    rows: dict[str, tuple[set[str], list[str]]] = {}
    for dialect in dialects().values():
        for serves in dialect.serves:
            roles, names = rows.setdefault(serves.trainer, (set(), []))
            if not serves.refused and not dialect.refused:
                roles |= set(serves.roles)
                names.append(dialect.name)
    told = (
        (f"`{trainer}`", ", ".join(sorted(roles)), ", ".join(f"`{name}`" for name in dict.fromkeys(names)))
        for trainer, (roles, names) in rows.items()
        if roles
    )
    return _table(["trainer", "roles", "dialects"], sorted(told))


def verbs() -> str:
    """Every verb, with the line that `--help` has for it."""
    from converter.cli import VERBS
    from converter.cli.verbs.all import app

    short = {command.name: command.short_help for command in app.registered_commands}
    return _table(["verb", ""], ((f"`{verb}`", short[verb] or "") for verb in VERBS))


def flags() -> str:
    """The flags that every verb which writes has, by panel."""
    import dataclasses
    from typing import get_type_hints

    from converter.cli.options import PANELS, Conversion

    hints = get_type_hints(Conversion, include_extras=True)
    options = [(f.name, hints[f.name].__metadata__[0]) for f in dataclasses.fields(Conversion)]
    rows = []
    for panel in PANELS:
        for name, option in (each for each in options if each[1].rich_help_panel == panel):
            declared = [d for d in option.param_decls or () if d.startswith("-")]
            names = [option.default] if isinstance(option.default, str) else []
            spelt = [*names, *declared] or [f"--{name.replace('_', '-')}"]
            shown = ", ".join(spelt) + (f" {option.metavar}" if option.metavar else "")
            rows.append((panel, f"`{shown}`", option.help or ""))
    return _table(["panel", "flag", ""], rows)


def recipes() -> str:
    """The shipped recipes, each with the line it says of itself."""
    from converter.recipe.recipe import shipped_recipes

    told = {name: text.splitlines()[0].lstrip("# ").rstrip() for name, text in shipped_recipes().items()}
    return _table(["recipe", ""], ((f"`{name}`", about) for name, about in told.items()))


def methods() -> str:
    """The PEFT methods that are merged, each as its own file describes it."""
    from converter.converters.merge.methods.finding import methods as registered

    rows = []
    for method in sorted(registered(), key=lambda m: (m.peft_type != "LORA", m.title.lower())):
        switch = f" with `{method.switch}`" if method.switch else ""
        weighted = "yes" if method.is_linear else "no"
        rows.append((method.title, f"`{method.peft_type}`{switch}", method.layers, weighted, method.remark))
    return _table(["method", "`peft_type`", "layers", "`--weight`", ""], rows)


def methods_refused() -> str:
    """The PEFT methods that have no merge, with the reason."""
    from converter.converters.merge.methods.finding import NOT_MERGEABLE

    return _table(["`peft_type`", "why it is refused"], ((f"`{kind}`", why) for kind, why in NOT_MERGEABLE.items()))


def peft_releases() -> str:
    """What became of adapters drawn with many releases of PEFT: written by a run of all of them."""
    return (REPOSITORY / "tests" / "trainers" / "peft_releases.md").read_text("utf-8").rstrip()


def saved_adapters() -> str:
    """What became of adapters that trainers saved: written by a run of all of them."""
    return (REPOSITORY / "tests" / "trainers" / "saved_adapters.md").read_text("utf-8").rstrip()


def bases() -> str:
    """Kinds of bases, and what a merge does where an adapter touches their weights."""
    from converter.families.quantised.reading import FORMATS

    rows = [("16 or 32 bits", "", "merged", "", "PEFT")]
    for method, formats in FORMATS.items():
        for each in formats:
            is_back = method == "mxfp4" or (method == "fp8" and "blocks" in each.words)
            rows.append((each.words, f"`{method}`", "`--dequantize`", "yes" if is_back else "", each.compared))
    return _table(["weights", "`quant_method`", "adapted weights", "`--requantize same`", "values compared with"], rows)


def bases_refused() -> str:
    """Bases whose quantised weights are not read."""
    from converter.families.quantised.reading import NOT_READ

    return _table(["base", "why it is refused where an adapter touches its weights"], NOT_READ.items())


TABLES: dict[str, Callable[[], str]] = {
    "bases": bases,
    "bases-refused": bases_refused,
    "coverage": coverage,
    "dialect-matrix": dialect_matrix,
    "failures": failures,
    "flags": flags,
    "methods": methods,
    "methods-refused": methods_refused,
    "peft-releases": peft_releases,
    "recipes": recipes,
    "saved-adapters": saved_adapters,
    "trainer-matrix": trainer_matrix,
    "reshard-pairs": reshard_pairs,
    "trainers": trainers,
    "verbs": verbs,
}


def with_tables(text: str) -> str:
    """A document with its tables as they should be."""

    def write(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return _MARKED.sub(write, text)


def documents() -> dict[str, str]:
    """Every document that may have tables, with its text."""
    paths = (name for name in DOCUMENTS if (REPOSITORY / name).is_file())
    return {name: (REPOSITORY / name).read_text("utf-8") for name in paths}


def declared_methods() -> str:
    """What the shipped PEFT methods declare, as `families/factors.py` reads it: their names without their code."""
    from converter.families.factors import declaration
    from converter.plugins import METHODS, load, named

    points = [points[0] for _, points in sorted(named(METHODS).items())]
    ours = [point for point in points if point.value.startswith("converter.")]
    rows = [f"  {json.dumps(point.value)}: {json.dumps(declaration(load(point)))}" for point in ours]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screens", action="store_true", help="run the screens' commands and renew what they print")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something would change")
    asked = parser.parse_args()
    changed = []
    for name, before in documents().items():
        after = with_tables(before)
        if asked.screens and name in PAGES:
            with tempfile.TemporaryDirectory() as folder, workplace(Path(folder)):
                after = renewed_page(after)
        if after != before:
            changed.append(name)
            if not asked.check:
                (REPOSITORY / name).write_text(after, "utf-8")
    from converter.families.factors import KEPT

    if not KEPT.exists() or KEPT.read_text("utf-8") != declared_methods():
        changed.append(str(KEPT.relative_to(REPOSITORY)))
        if not asked.check:
            KEPT.write_text(declared_methods(), "utf-8")
    for name in changed:
        print(f"{'differs' if asked.check else 'written'}  {name}")
    return 1 if asked.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
