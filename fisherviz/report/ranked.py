"""The ranked summary: the rows of the plain table, each number with its bar, and the table as a file.

A bar is the number's share of the column's largest, or of its powers of ten where the column spans many.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fisherviz.report.tables import Table
from fisherviz.results.comparison import Comparison
from fisherviz.support.names import no_formula

SPAN = 100.0  # largest over smallest number of a column, above which its bars are logarithmic


@dataclass(frozen=True)
class Entry:
    """A cell of the ranked table.

    Args:
        text: as people read it.
        best: whether it is the column's best.
        value: the number; None where there is none.
        bar: length of its bar, 0 to 100.
    """

    text: str
    best: bool
    value: float | None
    bar: float


def ranked(table: Table, comparison: Comparison) -> dict[str, Any]:
    """A summary table with numbers and bars.

    Args:
        table: from `tables.summary_table`.
        comparison: where its numbers are.

    Returns:
        "caption", "corner", "groups", "columns" (name and head) and "rows" (method and entries).
    """
    values = [comparison.whole(name) for name in table.names]
    bars = [_bars(column) for column in values]
    rows = []
    for method, cells in table.rows:
        entries = [
            Entry(cell.text, cell.best, column.get(method), lengths.get(method, 0.0))
            for cell, column, lengths in zip(cells, values, bars, strict=True)
        ]
        rows.append((method, entries))
    return {
        "caption": table.caption, "corner": table.corner, "groups": table.groups,
        "columns": list(zip(table.names, table.heads, strict=True)), "rows": rows,
    }  # fmt: skip


def _bars(column: dict[str, float]) -> dict[str, float]:
    sizes = [abs(value) for value in column.values() if math.isfinite(value) and value]
    if not sizes:
        return {}
    high, low = max(sizes), min(sizes)
    if high / low <= SPAN:
        return {name: 100 * min(1.0, max(0.0, value / high)) for name, value in column.items()}
    span = math.log(2 * high / low)
    return {
        name: 100 * min(1.0, math.log(2 * value / low) / span) if value > 0 else 0.0 for name, value in column.items()
    }


def csv_link(comparison: Comparison) -> str:
    """The summary, every digit of it, as the address of a file that needs no server and no script.

    Args:
        comparison: whose summary.

    Returns:
        A data: address.
    """
    summary = comparison.summary()
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(["method", *summary.columns])
    for method, row in summary.iterrows():
        writer.writerow([no_formula(str(method)), *("" if pd.isna(v) else repr(float(v)) for v in row)])
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(stream.getvalue().encode()).decode()
