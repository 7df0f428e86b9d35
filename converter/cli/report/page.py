"""A page as values, and as HTML: no script, no network, nothing of an input but escaped text.

Pictures are SVG in `img`, where nothing in them can run; colours follow the reader's theme, and paper is white. Every
picture has a text in its place, and the numbers behind it as a table.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from converter.cli.sink import as_typed
from converter.text import show
from converter.version import __version__

MOST_ROWS = 400
"""Rows of a table that a page has."""


@dataclass(frozen=True)
class Table:
    """Rows under a head; what is not among the first rows is counted."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """An SVG, what it shows in words, and the numbers in it."""

    svg: bytes
    alt: str
    caption: str = ""
    numbers: Table | None = None


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Verbatim:
    """Lines as they are: commands, a receipt. `title`: folded away under it."""

    text: str
    title: str = ""


Block = Table | Picture | Prose | Verbatim


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        facts: what stands beside each other at its top: a number and its word.
        card: the picture of `--report x.png`, PNG, made when it is asked for.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default=())


_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--paper:#fff;--tint:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--paper:#0d1117;--tint:#151b23}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:2rem 1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2.5rem 0 .75rem}
.sub,figcaption,footer{color:var(--soft);overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:.75rem;margin:1.5rem 0}
dl div{background:var(--tint);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .9rem}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
figure{margin:1rem 0}img{display:block;max-width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin:.5rem 0}
caption{text-align:left;color:var(--soft);padding-bottom:.25rem}
th,td{border-bottom:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top;
overflow-wrap:anywhere}
pre{background:var(--tint);border:1px solid var(--line);border-radius:.4rem;padding:.75rem;overflow:auto;
font-size:.85rem}
summary{cursor:pointer;color:var(--soft)}a:focus-visible,summary:focus-visible,pre:focus-visible{outline:2px solid}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--tint:#fff}body{max-width:none;padding:0}
figure,tr{break-inside:avoid}pre{white-space:pre-wrap}}
"""


def as_html(page: Page) -> str:
    """The page as one HTML document."""
    facts = "".join(f"<div><dt>{_text(word)}</dt><dd>{_text(value)}</dd></div>" for value, word in page.facts)
    sections = "".join(_section(each, n) for n, each in enumerate(page.sections, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(page.title)}</title><style>{_STYLE}</style></head>\n<body>"
        f'<header><h1>{_text(page.title)}</h1><p class="sub">{_text(page.subtitle)}</p><dl>{facts}</dl></header>\n'
        f"<main>{sections}</main>\n<footer><p>rlhf-convert {__version__}</p></footer></body></html>\n"
    )


def _section(section: Section, number: int) -> str:
    name = f"section-{number}"
    body = "".join(map(_block, section.blocks))
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{_text(section.heading)}</h2>{body}</section>\n'


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Prose(text):
            return f"<p>{_text(text)}</p>"
        case Verbatim(text, title):
            # A box that scrolls is reached with the keyboard.
            label = _text(title or "commands")
            lines = f'<pre tabindex="0" role="region" aria-label="{label}">{_lines(text)}</pre>'
            return f"<details><summary>{label}</summary>{lines}</details>" if title else lines
        case Picture():
            return _picture(block)


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.svg).decode()
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    numbers = ""
    if picture.numbers is not None:
        numbers = f"<details><summary>The numbers</summary>{_table(picture.numbers)}</details>"
    image = f'<img alt="{_text(picture.alt)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}{caption}</figure>{numbers}"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows[:MOST_ROWS])
    left = len(table.rows) - MOST_ROWS
    more = f"<p>and {left} more; --json has all</p>" if left > 0 else ""
    title = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"


def _text(value: object) -> str:
    """Text for a page: one line, what a reader would act on escaped, markup too."""
    return html.escape(as_typed(show(value, 600)))


def _lines(text: str) -> str:
    return "\n".join(html.escape(as_typed(show(each, 2000))) for each in text.split("\n"))
