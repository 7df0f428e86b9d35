"""The page of a run that writes: what went in, what became of each tensor, how far each layer moved, what came out."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence

from converter.cli import lines as report
from converter.cli.report import figures
from converter.cli.report.grid import Grid, outside, place_of, sizes, swallowed, updated
from converter.cli.report.page import Block, Page, Picture, Prose, Section, Table, Verbatim
from converter.converters.adapters.pairs import read_pairs
from converter.core.checkpoint import ADAPTER, Checkpoint
from converter.core.compute.measures import relative_size, surviving_share
from converter.core.tensors.nodes import LazyTensor
from converter.core.writer import preflight
from converter.diagnostic import Command, Next
from converter.errors import ConvertError
from converter.families.words import HEAD_MODULES
from converter.recipe.verbs.conversion import Conversion
from converter.sources.hub.secrets import words_without_token
from converter.text import fold, format_duration, format_size, show

HEAD_ELEMENTS = 1 << 18
"""Values of a head that are read to be drawn; of a larger one nothing is."""

FACTOR_ELEMENTS = 1 << 28
"""Values of factors that are read, one pair at a time, for their spectra; pairs past it are counted."""


def page_of(done: Conversion, following: Sequence[Next]) -> Page:
    """The report of a conversion that is written or planned."""
    sections = [
        Section("What was made of what", list(_flow(done))),
        Section("Tensors by fate", list(_fates(done))),
    ]
    for heading, blocks in (
        ("How far each layer moved", list(_moved(done))),
        ("The spectrum of each update", list(_spectra(done))),
        ("The head", list(_heads(done))),
    ):
        if blocks:
            sections.append(Section(heading, blocks))
    sections += [
        Section("Findings", [_findings(done)]),
        Section("Memory and time", [_cost(done)]),
        Section("Again, and what next", list(_again(done, following))),
    ]
    verb = done.recipe.file or "run"
    out = show(str(done.out)) if done.out is not None else "planned, nothing is written"
    return Page(f"{verb}: {out}", _subtitle(done), facts_of(done), sections)


def facts_of(done: Conversion) -> list[tuple[str, str]]:
    """Numbers for the top of the page, and for a card."""
    counts, receipt = done.plan.counts, done.receipt
    facts = [
        (format_size(done.plan.total_bytes), "size"),
        (str(counts["copied"] + counts["computed"] + counts["filled"]), "tensors"),
        (str(counts["computed"]), "computed"),
    ]
    found = list(updated({} if receipt is None else receipt.measures).values())
    if found:
        facts += [(f"{100 * relative_size(found):.3g} %", "update, of the weights' norm")]
        facts += [(f"{100 * surviving_share(found):.4g} %", "of it survives rounding")]
    return facts


def grid_of_run(done: Conversion) -> Grid | None:
    """The grid of a card: the size of the update."""
    measures = {} if done.receipt is None else done.receipt.measures
    return sizes(measures) if updated(measures) else None


def _subtitle(done: Conversion) -> str:
    config = done.checkpoint.config
    named = config.get("architectures")
    kind = report.adapter_kind(config) if config.get("peft_type") else ""
    words = [kind or (str(named[0]) if isinstance(named, list) and named else done.checkpoint.origin.kind)]
    words.append(report.dtype_words(done.checkpoint))
    return ", ".join(words)


def _flow(done: Conversion) -> Iterator[Block]:
    opened = done.prepared.opened
    inputs = [f"{name}: {c.origin.name}\n{len(c)} tensors, {format_size(c.total_bytes)}" for name, c in opened.items()]
    steps = [step.name for step in done.recipe.steps]
    name = "planned" if done.out is None else str(done.out).rstrip("/").rpartition("/")[2]
    made = f"{name}\n{sum(len(s.entries) for s in done.plan.shards)} tensors, {format_size(done.plan.total_bytes)}"
    alt = f"{', '.join(opened)} go through {', '.join(steps) or 'no step'} and become {name}"
    yield Picture(figures.flow(inputs, steps, made), alt)
    rows = [
        (n, c.origin.kind, c.origin.asked, c.origin.revision or "", report.dtype_words(c), len(c))
        for n, c in opened.items()
    ]
    yield Table(("input", "kind", "from", "revision", "dtype", "tensors"), rows)


def _fates(done: Conversion) -> Iterator[Block]:
    adapters = [c for c in done.prepared.opened.values() if c.origin.kind == ADAPTER]
    groups = {word: names for word, names in report.fates(done.plan, done.checkpoint, adapters).items() if names}
    counts = [float(len(names)) for names in groups.values()]
    alt = ", ".join(f"{len(names)} {word}" for word, names in groups.items())
    rows = [(word, len(names), fold(names, 6)) for word, names in groups.items()]
    yield Picture(figures.bars(list(groups), counts, "tensors"), alt, numbers=Table(("fate", "tensors", "names"), rows))
    dropped = [(name, why) for name, why in done.plan.dropped.items()]
    if dropped:
        yield Table(("dropped", "why"), dropped)
    repaired = list(done.checkpoint.repaired.items())
    if repaired:
        yield Table(("filled", "from"), repaired)


def _moved(done: Conversion) -> Iterator[Block]:
    measures = {} if done.receipt is None else done.receipt.measures
    found = updated(measures)
    if not found:
        return
    for grid, label, log, caption in (
        (sizes(measures), "size of the update / size of the weight", True, "The update's norm over the weight's."),
        (swallowed(measures), "share swallowed by rounding", False, "What rounding to the output's dtype swallowed."),
    ):
        if grid.known:
            worst = max(grid.known, key=lambda cell: cell[2])
            alt = f"{caption} Largest: {worst[2]:.3g} in layer {worst[1]}, {worst[0]}; smallest {_least(grid):.3g}"
            rows = [(row, column, f"{value:.6g}") for row, column, value in grid.known]
            numbers = Table(("projection", "layer", label), rows)
            yield Picture(figures.heat(grid, label, log=log), alt, caption, numbers)
    rest = [
        (name, f"{relative_size([found[name]]):.4g}", f"{1 - surviving_share([found[name]]):.4g}")
        for name in outside(found)
    ]
    if rest:
        yield Table(("outside of the layers", "size of the update", "swallowed by rounding"), rest)


def _least(grid: Grid) -> float:
    return min(value for _, _, value in grid.known)


def _spectra(done: Conversion) -> Iterator[Block]:
    """Singular values from the factors of plain LoRA; other methods have no factors that are as cheap."""
    from converter.core.compute.evaluate import to_torch
    from converter.core.compute.spectra import singular_values

    for adapter in (c for c in done.prepared.opened.values() if c.origin.kind == ADAPTER):
        try:
            pairs = [p for p in read_pairs(adapter).pairs if not p.is_stacked]
        except ConvertError:
            continue
        drawn: list[tuple[int, list[float]]] = []
        rows, read = [], 0
        for pair in pairs:
            read += pair.a.info.numel + pair.b.info.numel
            place = place_of(f"{pair.module}.weight")
            if read > FACTOR_ELEMENTS or place is None:
                continue
            values = singular_values(to_torch(pair.a), to_torch(pair.b), pair.scale)
            drawn.append((place[1], values))
            rows.append(
                (pair.module, len(values), f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{_effective(values):.3g}")
            )
        if not drawn:
            continue
        label = "value of scale * B A"
        alt = f"Singular values of {len(drawn)} updates of {show(adapter.origin.name)}, a line each, coloured by layer"
        head = ("module", "rank", "largest", "smallest", "effective rank")
        caption = (
            "From the factors by QR. The effective rank is the sum of squares, squared, over that of fourth powers."
        )
        yield Picture(figures.spectra(_thinned(drawn), label), alt, caption, Table(head, rows))
        if len(drawn) < len(pairs):
            yield Prose(f"{len(pairs) - len(drawn)} pairs are outside of the layers, or past what is read for a report")


def _thinned(lines: Sequence[tuple[int, Sequence[float]]], most: int = 400) -> list[tuple[int, Sequence[float]]]:
    """At most so many lines, evenly taken: a page stays small."""
    step = -(-len(lines) // most)
    return list(lines[::step])


def _effective(values: Sequence[float]) -> float:
    squares = [v * v for v in values]
    total = sum(squares)
    return total * total / sum(s * s for s in squares) if total else 0.0


def _heads(done: Conversion) -> Iterator[Block]:
    """Values of a head as they were and as they are written."""
    sources = done.prepared.opened
    tensors = [(n, t) for n, t in done.checkpoint.tensors.items() if _is_head(n)]
    tensors += [(f"{f}: {n}", t) for f, held in done.checkpoint.beside.items() for n, t in held.items() if _is_head(n)]
    for name, tensor in tensors:
        if not 0 < tensor.info.numel <= HEAD_ELEMENTS or not tensor.info.dtype.is_float:
            continue
        after = _values(tensor)
        before = _before(name.rpartition(": ")[2], tensor, sources)
        series = [*([("before", before)] if before else []), ("after", after)]
        rows = [(word, *_statistics(values)) for word, values in series]
        alt = "; ".join(f"{row[0]}: {row[1]} values, mean {row[2]}, deviation {row[3]}" for row in rows)
        numbers = Table(("", "values", "mean", "deviation", "norm", "least", "largest"), rows)
        yield Picture(figures.histograms(series, show(name, 60)), f"{show(name)}: {alt}", show(name), numbers)


def _is_head(name: str) -> bool:
    return any(word in HEAD_MODULES for word in name.split("."))


def _before(name: str, tensor: LazyTensor, sources: Mapping[str, Checkpoint]) -> list[float]:
    """Values of the tensor of that name in an input, where one has it and it is of the same size."""
    for opened in sources.values():
        for key, held in opened.tensors.items():
            if (key == name or key.endswith(f".{name}")) and held.info.numel == tensor.info.numel:
                return _values(held)
    return []


def _values(tensor: LazyTensor) -> list[float]:
    from converter.core.compute.evaluate import to_torch

    found: list[float] = to_torch(tensor).double().flatten().tolist()
    return found


def _statistics(values: Sequence[float]) -> tuple[object, ...]:
    n = len(values)
    mean = sum(values) / n
    spread = (sum((v - mean) ** 2 for v in values) / n) ** 0.5
    norm = sum(v * v for v in values) ** 0.5
    return n, f"{mean:.4g}", f"{spread:.4g}", f"{norm:.4g}", f"{min(values):.4g}", f"{max(values):.4g}"


def _findings(done: Conversion) -> Block:
    rows = [(n.severity, n.code, n.text) for n in done.notes]
    if not rows:
        return Prose("No note: nothing of the inputs stood in the way, and nothing was consented to.")
    return Table(("severity", "code", "what"), rows)


def _cost(done: Conversion) -> Block:
    rows: list[tuple[str, str]] = [("written", format_size(done.plan.total_bytes))]
    rows.append(("memory that the plan needs", format_size(preflight.needed_memory(done.plan, done.jobs))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows.append(("most memory that the process had", format_size(peak)))
    if done.receipt is not None:
        rows.append(("time to write and check", format_duration(done.receipt.seconds)))
        rows.append(("tensors read back", str(done.receipt.reread)))
        rows.append(("of them computed again", str(done.receipt.recomputed)))
    return Table(("", ""), rows)


def _again(done: Conversion, following: Sequence[Next]) -> Iterator[Block]:
    words = words_without_token(sys.argv[1:])
    if words:
        yield Verbatim(str(Command(words[0], tuple(words[1:]))))
    if following:
        yield Verbatim("\n".join(map(str, following)))
    yield Verbatim(done.recipe.to_yaml().rstrip("\n"), "The recipe")
    if done.receipt is not None:
        yield Verbatim(json.dumps(dict(done.receipt.content), indent=1)[:200_000], "The receipt")
