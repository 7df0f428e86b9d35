"""Pictures, drawn by matplotlib without a screen. Text of inputs is never taken for mathematics or markup.

An SVG's ink is `currentColor`, which a style in it sets by the reader's theme.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from converter.cli.report.grid import Grid
from converter.text import show

INK = "#123457"
"""Stands for the reader's own colour of text in what matplotlib draws."""

BLUE, RED, GREEN, GREY = "#2f6fde", "#d1453b", "#2b9348", "#8b949e"
_MOST_TICKS = 40

_THEME = (
    "<style>svg{color:#1f2328}@media (prefers-color-scheme:dark){svg{color:#e6edf3}}"
    "@media print{svg{color:#000}}</style>"
)

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf-convert",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes; no window, and none of the user's own settings."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


def _svg(figure: Any) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="svg", transparent=True, dpi=144, metadata={"Date": None, "Creator": None})
    text = held.getvalue().decode().replace(INK, "currentColor")
    begin = text.index("<svg")
    end = text.index(">", begin) + 1
    return (text[begin:end] + _THEME + text[end:]).encode()


def heat(grid: Grid, label: str, *, log: bool = False) -> bytes:
    """Layers by projections."""
    from matplotlib.colors import LogNorm

    known = [v for _, _, v in grid.known if v > 0]
    with _drawing(9, 1.2 + 0.24 * len(grid.rows)) as (figure, axes):
        values = [[float("nan") if v is None else v for v in row] for row in grid.values]
        norm = LogNorm(min(known), max(known)) if log and known and min(known) < max(known) else None
        drawn = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
        axes.set_yticks(range(len(grid.rows)), [show(r, 34) for r in grid.rows])
        step = -(-len(grid.columns) // _MOST_TICKS)
        axes.set_xticks(range(0, len(grid.columns), step), [str(c) for c in grid.columns[::step]])
        axes.set_xlabel("layer")
        _plain(figure.colorbar(drawn, ax=axes, pad=0.01, label=label).ax.yaxis)
        return _svg(figure)


def _plain(axis: Any) -> None:
    """Ticks as plain numbers: those of logarithms are mathematics, which is not drawn here."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(names: Sequence[str], values: Sequence[float], label: str) -> bytes:
    """A bar for each name."""
    with _drawing(9, 0.7 + 0.3 * len(names)) as (figure, axes):
        drawn = axes.barh(range(len(names)), values, color=BLUE, height=0.6)
        axes.bar_label(drawn, [f"{v:,g}" for v in values], padding=3)
        axes.set_yticks(range(len(names)), [show(n, 40) for n in names])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.margins(x=0.1)
        return _svg(figure)


def flow(inputs: Sequence[str], steps: Sequence[str], output: str) -> bytes:
    """Inputs on the left, steps in the middle, the output on the right."""
    rows = max(len(inputs), len(steps), 1)
    with _drawing(9, 0.6 + 0.5 * rows) as (figure, axes):
        axes.set_axis_off()
        axes.set_xlim(0, 3)
        axes.set_ylim(-0.5, rows - 0.5)
        middle = (rows - 1) / 2
        for n, text in enumerate(inputs):
            y = middle + (len(inputs) - 1) / 2 - n
            _box(axes, 0.5, y, text, GREY)
            _arrow(axes, (0.97, y), (1.13, middle))
        _box(axes, 1.5, middle, "\n".join(show(s, 30) for s in steps) or "copy", BLUE)
        _arrow(axes, (1.87, middle), (2.03, middle))
        _box(axes, 2.5, middle, output, GREEN)
        return _svg(figure)


def _box(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    lines = [show(each, 34) for each in text.split("\n")]
    box = {"boxstyle": "round,pad=0.5", "facecolor": "none", "edgecolor": colour, "linewidth": 1.5}
    axes.text(x, y, "\n".join(lines), ha="center", va="center", bbox=box)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK})


def spectra(lines: Sequence[tuple[int, Sequence[float]]], label: str) -> bytes:
    """Singular values, a line for each update, by layer."""
    import matplotlib
    import matplotlib.ticker

    last = max((layer for layer, _ in lines), default=0) or 1
    colours = matplotlib.colormaps["viridis"]
    with _drawing(9, 3.2) as (figure, axes):
        for layer, values in lines:
            axes.plot(range(1, len(values) + 1), values, color=colours(layer / last), linewidth=0.8, alpha=0.7)
        if any(v > 0 for _, values in lines for v in values):
            axes.set_yscale("log")
        _plain(axes.yaxis)
        axes.set_xlabel("singular value")
        axes.set_ylabel(label)
        shade = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, last), colours)
        ticks = matplotlib.ticker.MaxNLocator(integer=True)
        figure.colorbar(shade, ax=axes, pad=0.01, label="layer", ticks=ticks)
        return _svg(figure)


def histograms(series: Sequence[tuple[str, Sequence[float]]], label: str) -> bytes:
    """Values of one or two sets, in common bins."""
    low = min((min(v) for _, v in series if v), default=0.0)
    high = max((max(v) for _, v in series if v), default=1.0)
    edges = [low + (high - low or 1.0) * n / 60 for n in range(61)]
    with _drawing(9, 2.6) as (figure, axes):
        for (name, values), colour in zip(series, (GREY, BLUE), strict=False):
            axes.hist(values, bins=edges, histtype="stepfilled", alpha=0.55, color=colour, label=show(name, 40))
        axes.set_xlabel(label)
        axes.set_ylabel("values")
        axes.legend(frameon=False)
        return _svg(figure)


def scatter(x: Sequence[float], y: Sequence[float], odd: Sequence[bool], words: tuple[str, str, str]) -> bytes:
    """One set of scores against another; the odd ones stand out, and equal ones lie on the line.

    Args:
        words: of the two axes, and of what is odd.
    """
    with _drawing(6, 4.6) as (figure, axes):
        ends = [min((*x, *y)), max((*x, *y))]
        axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--")
        for is_odd, colour, mark in ((False, BLUE, "o"), (True, RED, "X")):
            shown = [(a, b) for a, b, o in zip(x, y, odd, strict=True) if o is is_odd]
            if shown:
                label = words[2] if is_odd else None
                axes.scatter(*zip(*shown, strict=True), s=16, color=colour, marker=mark, label=label, alpha=0.7)
        axes.set_xlabel(words[0])
        axes.set_ylabel(words[1])
        if any(odd):
            axes.legend(frameon=False)
        return _svg(figure)


def calibration(points: Sequence[tuple[float, float, int]]) -> bytes:
    """How often the chosen answer wins against how often its margin says it should (Bradley and Terry)."""
    with _drawing(6, 4.6) as (figure, axes):
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle="--")
        sizes = [20 + 180 * n / max(c for _, _, c in points) for _, _, n in points]
        axes.scatter([p for p, _, _ in points], [q for _, q, _ in points], s=sizes, color=BLUE, alpha=0.7)
        axes.set_xlabel("what the margin says: sigmoid(|margin|)")
        axes.set_ylabel("share of pairs in the right order")
        axes.set_ylim(0, 1.03)
        return _svg(figure)


def card(title: str, facts: Sequence[tuple[str, str]], grid: Grid | None, label: str) -> bytes:
    """A card of 1200 by 630 points, PNG: the title, facts, and the grid where there is one."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"text.parse_math": False, "font.size": 13})
        figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.04, 0.9, show(title, 64), fontsize=24, weight="bold")
        for n, (value, word) in enumerate(facts[:5]):
            figure.text(0.04 + 0.19 * n, 0.78, show(value, 18), fontsize=17)
            figure.text(0.04 + 0.19 * n, 0.73, show(word, 24), fontsize=11, color=GREY)
        if grid is not None and grid.known:
            axes = figure.add_axes((0.2, 0.12, 0.7, 0.54))
            values = [[float("nan") if v is None else v for v in row] for row in grid.values]
            drawn = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
            axes.set_yticks(range(len(grid.rows)), [show(r, 24) for r in grid.rows], fontsize=10)
            axes.set_xlabel("layer")
            figure.colorbar(drawn, ax=axes, pad=0.01).set_label(label)
        figure.text(0.96, 0.02, "rlhf-convert", ha="right", fontsize=11, color=GREY)
        held = io.BytesIO()
        figure.savefig(held, format="png", metadata={"Software": None})
        return held.getvalue()
