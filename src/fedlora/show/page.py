"""A self-contained HTML page: sections with tables and figures. It has no script and loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from fedlora.show.figures import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem;
  color: #111; background: #fff; }
h1 { font-size: 1.5rem; margin: .2rem 0; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; border-bottom: 1px solid #bbb; }
p { margin: .3rem 0; max-width: 46rem; color: #333; }
.row { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: 0; break-inside: avoid; flex: 1 1 21rem; min-width: min(100%, 21rem); max-width: 24rem; }
figure.large { max-width: 38rem; }
image { image-rendering: pixelated; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #333; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #555; }
@media print {
  body { max-width: none; font-size: 10pt; }
  .wide { overflow: visible; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  .row { display: block; }
  figure { display: inline-block; vertical-align: top; width: 48%; min-width: 0; }
  figure.large { width: 80%; }
}
"""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        head: the columns' names.
        rows: the cells as text.
        text: whether the cells hold sentences, which are left-aligned and wrapped, rather than numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False

    def html(self) -> str:
        """The table as an element."""
        head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in self.head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        style = " class=text" if self.text else ""
        return f"<div class=wide><table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: its heading.
        note: a sentence below it; omitted if empty.
        tables: its tables.
        figures: its figures by name; the names are those of the files that ``save`` writes.
        captions: a caption for each figure, by name.
        large: whether its figures may be as wide as the page.
    """

    title: str
    note: str = ""
    tables: Sequence[Table] = ()
    figures: dict[str, Figure] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    large: bool = False

    def html(self) -> str:
        """The section as elements."""
        parts = [f"<h2>{escape(self.title)}</h2>"]
        parts += [f"<p>{escape(self.note)}</p>"] if self.note else []
        shown = [table.html() for table in self.tables]
        shown += [self._figure(name, figure) for name, figure in self.figures.items()]
        parts += [f"<div class=row>{''.join(shown)}</div>"]
        return "<section>" + "".join(parts) + "</section>"

    def _figure(self, name: str, figure: Figure) -> str:
        caption = self.captions.get(name, "")
        label = f' role="img" aria-label="{escape(caption or name)}"'
        drawing = svg(figure, name).replace("<svg ", f"<svg{label} ", 1)
        size = " class=large" if self.large else ""
        return f'<figure id="{escape(name)}"{size}>{drawing}<figcaption>{escape(caption)}</figcaption></figure>'


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page.

    Args:
        title: its title.
        subtitle: a line below it.
        sections: its parts; those without content are left out.
    """
    shown = [section for section in sections if section.tables or section.figures]
    body = "".join(section.html() for section in shown)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>{body}</body></html>\n"
    )
