"""Pages of the verbs that read: doctor's findings, two checkpoints compared, a folder verified."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converter.cli.report import figures
from converter.cli.report.grid import Grid, grid_of, outside
from converter.cli.report.page import Block, Page, Picture, Prose, Section, Table, Verbatim
from converter.diagnostic import Command, Next
from converter.sources.hub.secrets import words_without_token
from converter.text import fold, format_size, show

if TYPE_CHECKING:
    from converter.examine.doctor import Report
    from converter.examine.verify.verify import Verified
    from converter.recipe.verbs.diff import Compared


def again(following: Sequence[Next] = ()) -> Section:
    """The command of this page, and what to type next."""
    words = words_without_token(sys.argv[1:])
    blocks: list[Block] = [Verbatim(str(Command(words[0], tuple(words[1:]))))] if words else []
    blocks += [Verbatim("\n".join(map(str, following)))] if following else []
    return Section("Again, and what next", blocks)


# doctor


def page_of_doctor(report: Report) -> Page:
    """Findings, with what proves each."""
    from converter.examine.diagnoses.causes import commands_of

    case = report.case
    counts = Counter(f.severity for f in report.findings)
    facts = [(str(counts[s]), s) for s in ("error", "changes-numbers", "cosmetic")]
    facts.append((str(len(case.survey.entries)), "tensors"))
    sections = []
    if report.findings:
        found = [(s, float(n)) for s, n in counts.items()]
        alt = ", ".join(f"{n} {s}" for s, n in counts.items())
        blocks: list[Block] = [Picture(figures.bars([s for s, _ in found], [n for _, n in found], "findings"), alt)]
        for each in report.findings:
            rows = [("what", each.text), *(("evidence", e) for e in each.evidence)]
            rows += [("recoverable", each.recoverability)] if each.recoverability else []
            rows += [("next", str(each.next))] if each.next else []
            rows += [("tensors", fold(each.tensors, 8))] if each.tensors else []
            blocks.append(Table((each.severity, each.code), rows))
        sections.append(Section("Findings", blocks))
    else:
        sections.append(Section("Findings", [Prose("No finding in what was examined.")]))
    if report.not_compared:
        sections.append(Section("Not checked", [Prose(f"{report.not_compared}.")]))
    files = [(name, format_size(size)) for name, size in case.survey.files.items()]
    if files:
        sections.append(Section("Files", [Table(("file", "size"), files)]))
    sections.append(again(commands_of(report.findings)))
    return Page(f"doctor: {show(case.asked)}", f"{case.kind}, {case.why}", facts, sections)


# diff


def page_of_diff(done: Compared) -> Page:
    """Which tensors changed, by layer and projection, and what else differs."""
    found = done.difference
    counts = Counter[str](p.status for p in found.pairs)
    counts.update({w: len(n) for w, n in (("only a", found.missing), ("only b", found.extra)) if n})
    alt = ", ".join(f"{n} {word}" for word, n in counts.items())
    bars = figures.bars(list(counts), [float(n) for n in counts.values()], "tensors")
    sections = [Section("Tensors", [Picture(bars, alt)])] if counts else []
    blocks = list(_changes(done))
    if blocks:
        sections.append(Section("How far each layer is apart", blocks))
    rest: list[Block] = []
    for title, names in (("only in a", found.missing), ("only in b", found.extra)):
        rest += [Table((title,), [(n,) for n in names])] if names else []
    if found.config:
        rest.append(Table(("config", "a", "b"), [(k, str(x), str(y)) for k, (x, y) in found.config.items()]))
    if found.side_files:
        rest.append(Table(("file", ""), list(found.side_files.items())))
    if rest:
        sections.append(Section("What else differs", rest))
    facts = [(str(n), word) for word, n in counts.items()]
    one, two = (show(c.origin.asked) for c in (done.a, done.b))
    title = f"diff: {one} and {two}"
    return Page(title, "equal" if done.is_equal else "different", facts, [*sections, again()])


def grid_of_diff(done: Compared) -> Grid | None:
    """The largest relative change of each cell."""
    changed = {p.a: p.relative for p in done.pairs if p.status == "changed" and math.isfinite(p.relative)}
    same = {p.a: 0.0 for p in done.pairs if p.status in ("equal", "rounded")}
    return grid_of(same | changed, max) if changed else None


def _changes(done: Compared) -> Iterator[Block]:
    grid = grid_of_diff(done)
    label = "norm of the change / norm of a"
    if grid is not None and grid.known:
        worst = max(grid.known, key=lambda cell: cell[2])
        alt = f"Relative change by layer and projection; the largest is {worst[2]:.3g} in layer {worst[1]}, {worst[0]}"
        rows = [(row, column, f"{value:.6g}") for row, column, value in grid.known]
        numbers = Table(("projection", "layer", label), rows)
        yield Picture(figures.heat(grid, label, log=True), alt, "0 where nothing changed.", numbers)
    changed = sorted((p for p in done.pairs if p.status in ("changed", "shape")), key=lambda p: -p.relative)
    if changed:
        told = [(p.a, p.b if p.b != p.a else "", p.status, f"{p.relative:.4g}", f"{p.largest:.4g}") for p in changed]
        apart = outside(p.a for p in changed)
        head = ("a", "b", "", "relative", "largest")
        yield Table(head, told, f"The largest change first; {len(apart)} of them belong to no layer")


# verify


def page_of_verify(folder: str, found: Verified, following: Sequence[Next]) -> Page:
    """Checks, and what scored pairs say."""
    counts = Counter(c.outcome for c in found.checks)
    facts = [(str(counts[o]), o) for o in ("holds", "note", "fails")]
    rows = [(c.outcome, c.label, c.text, c.code or "", str(c.next or "")) for c in found.checks]
    sections = [Section("Checks", [Table(("", "check", "what", "code", "next"), rows)])]
    if found.table:
        sections.append(Section("Scored pairs", list(_pairs(found.table))))
    subtitle = f"for {found.aim.words} as {found.aim.role}: {'fails' if found.failed else 'verified'}"
    return Page(f"verify: {show(folder)}", subtitle, facts, [*sections, again(following)])


def _pairs(table: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    margins = [float(row["margin"]) for row in table]
    series = [("here", margins)]
    if "source_chosen" in table[0]:
        ours = [float(row[k]) for row in table for k in ("chosen", "rejected")]
        theirs = [float(row[f"source_{k}"]) for row in table for k in ("chosen", "rejected")]
        before = [float(row["source_chosen"]) - float(row["source_rejected"]) for row in table]
        flipped = [(a > 0) != (b > 0) for a, b in zip(margins, before, strict=True)]
        series = [("source", before), ("here", margins)]
        odd = [f for f in flipped for _ in range(2)]
        words = ("score of the source", "score here", "of a pair that flipped")
        moved = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        alt = f"Scores here against the source's: {len(ours)} scores, moved by {moved:.3g} at most"
        yield Picture(figures.scatter(theirs, ours, odd, words), alt, "On the line nothing moved.")
        rows = [
            (row["prompt"], f"{b:.4g}", f"{m:.4g}")
            for row, m, b, f in zip(table, margins, before, flipped, strict=True)
            if f
        ]
        title = f"{len(rows)} of {len(table)} pairs changed order"
        yield Table(("prompt", "margin of the source", "margin here"), rows, title) if rows else Prose(title)
    right = sum(m > 0 for m in margins)
    alt = f"Margins of {len(margins)} pairs, chosen less rejected; {right} are above 0"
    yield Picture(figures.histograms(series, "margin"), alt, "Right of 0 the chosen answer scores higher.")
    points = calibrated(margins)
    groups = [(f"{p:.3f}", f"{q:.3f}", n) for p, q, n in points]
    numbers = Table(("what the margin says", "share in the right order", "pairs"), groups)
    alt = f"Calibration in {len(points)} groups: " + ", ".join(f"{p:.2f} says {q:.2f}" for p, q, _ in points)
    caption = "On the line a margin says as much as it is worth; a circle's area is its number of pairs."
    yield Picture(figures.calibration(points), alt, caption, numbers)


def calibrated(margins: Sequence[float], groups: int = 8) -> list[tuple[float, float, int]]:
    """By the size of the margin: what it says, how often it is right, of how many pairs.

    A margin m says that its order is right with the probability `1 / (1 + exp(-|m|))` (Bradley and Terry).
    """
    ordered = sorted(margins, key=abs)
    size = max(-(-len(ordered) // groups), 1)
    found = []
    for at in range(0, len(ordered), size):
        part = ordered[at : at + size]
        said = sum(1 / (1 + math.exp(-min(abs(m), 500.0))) for m in part) / len(part)
        found.append((said, sum(m > 0 for m in part) / len(part), len(part)))
    return found
