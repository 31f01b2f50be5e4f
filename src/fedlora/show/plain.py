"""Figures for papers as text: paired differences over seeds, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from fedlora.core.later import scipy


def paired(mine: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float | None] | None:
    """Mean difference over common seeds, and half-width of its 95 % interval: ``t(0.975, n - 1) s / sqrt(n)``."""

    gaps = [value - other[seed] for seed, value in mine.items() if seed in other]
    if not gaps:
        return None
    if len(gaps) == 1:
        return gaps[0], None
    return mean(gaps), float(scipy.stats.t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))


def interval(found: tuple[float, float | None] | None) -> str:
    """A paired difference as text: ``-0.016 [-0.036, +0.003]``; without an interval for a single pair."""
    if found is None:
        return ""
    middle, half = found
    return f"{middle:+.3f}" + ("" if half is None else f" [{middle - half:+.3f}, {middle + half:+.3f}]")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as CSV; empty without rows."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def tabular(blocks: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """One LaTeX ``tabular`` for ``booktabs``, with titled blocks of rows below one another; empty without rows."""
    rows = [row for block in blocks.values() for row in block]
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [rf"\begin{{tabular}}{{{'l' * len(columns)}}}", r"\toprule", " & ".join(map(_tex, columns)) + r" \\"]
    for title, block in blocks.items():
        lines.append(r"\midrule")
        if title:
            lines.append(rf"\multicolumn{{{len(columns)}}}{{l}}{{{_tex(title)}}} \\")
        # a bracket or star that begins a row would be an argument of the command before it
        cells = [" & ".join(map(_tex, row.values())) for row in block]
        lines += [("{}" if row.startswith(("[", "*")) else "") + row + r" \\" for row in cells]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


_TEX = str.maketrans(
    {
        **{char: rf"\{char}" for char in "_%&#{}$"},
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "±": r"$\pm$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)


def _tex(text: str) -> str:
    return text.translate(_TEX).replace(" * ", r" $\times$ ")
