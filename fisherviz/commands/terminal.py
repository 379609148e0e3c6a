"""Tables in a terminal: numbers stay whole; columns that have no room are left out, the least important first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from fisherviz.support.names import visible

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        head: its words stand one above the other.
        cells: a text for each row.
        bold: rows whose cell is the best.
        importance: columns with less give way first; the first column of a table never does.
        right: whether it stands to the right, as numbers do.
    """

    head: str
    cells: Sequence[str]
    bold: frozenset[int] = frozenset()
    importance: float = 0.0
    right: bool = True


def tell(text: str, *, err: bool = False) -> None:
    """Print a line as it is, but for characters that would steer the terminal.

    Args:
        text: the line.
        err: to the standard error.
    """
    typer.echo(visible(text), err=err)


def say(text: str) -> None:
    """Print a sentence, its lines broken between words; what has lines already is left as it is.

    Args:
        text: one line, or several.
    """
    from rich.console import Console

    Console(soft_wrap="\n" in text.strip(), emoji=False).print(visible(text), markup=False, highlight=False)


def print_table(columns: Sequence[Column], title: str = "", elsewhere: str = "") -> None:
    """Print a table as wide as the terminal allows.

    Args:
        columns: from left to right.
        title: above it.
        elsewhere: where the columns are that have no room, as the end of a sentence.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(emoji=False)
    unbounded = console.options.update(max_width=10_000)
    shown, dropped = list(columns), []
    while len(shown) > 2 and Measurement.get(console, unbounded, _table(shown)).maximum > console.width:
        least = min(shown[1:], key=lambda column: (column.importance, -shown.index(column)))
        shown.remove(least)
        dropped.append(least)
    if title:
        console.print(visible(title), markup=False, highlight=False)
    console.print(_table(shown))
    if dropped:
        names = ", ".join(column.head for column in columns if column in dropped)
        console.print(
            visible(f"No room in {console.width} columns for: {names}{elsewhere and f'; {elsewhere}'}.\n"),
            markup=False, highlight=False,
        )  # fmt: skip


def _table(columns: Sequence[Column]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(
            Text("\n".join(visible(column.head).split())), justify="right" if column.right else "left", no_wrap=True
        )
    for row in range(max(len(column.cells) for column in columns)):
        table.add_row(*(
            Text(visible(column.cells[row]), "bold" if row in column.bold else "")
            for column in columns
        ))  # fmt: skip
    return table
