"""Tables and lines that objects show of themselves: aligned text for terminals, escaped HTML for notebooks.

Whatever a cell holds stays text. Colours are the notebook's own, so that dark ones stay readable.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

from fisherviz.support.names import readable

Rows = Sequence[Sequence[str]]
_LEFT, _RIGHT = " style='text-align:left'", " style='text-align:right'"


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 layer", "1,200 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def text_table(head: Sequence[str], rows: Rows, words: Collection[int] = (0,), width: int | None = None) -> str:
    """Columns under their heads, words on the left and numbers on the right.

    Args:
        head: of the columns; it may have several lines.
        rows: their cells.
        words: positions of the columns that are words.
        width: characters of a line; what does not fit follows below, under the first column again. None: no bound.

    Returns:
        A line per row, the head first.
    """
    height = max(text.count("\n") for text in head) + 1
    heads = [[""] * (height - 1 - text.count("\n")) + text.split("\n") for text in head]
    lines = [list(line) for line in zip(*heads, strict=True)]
    lines += [[readable(cell) if cell else "" for cell in row] for row in rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    parts, taken = [[0]], widths[0]
    for k in range(1, len(head)):
        if width is not None and taken + 2 + widths[k] > width and len(parts[-1]) > 1:
            parts.append([0])
            taken = widths[0]
        parts[-1].append(k)
        taken += 2 + widths[k]
    placed = (
        "\n".join(
            "  ".join(line[k].ljust(widths[k]) if k in words else line[k].rjust(widths[k]) for k in part).rstrip()
            for line in lines
        )
        for part in parts
    )
    return "\n\n".join(text.lstrip("\n") for text in placed)


def html_table(
    head: Sequence[str], rows: Rows, *, words: Collection[int] = (0,), caption: str = "", notes: Iterable[str] = ()
) -> str:
    """The same for a notebook; the first column names the rows.

    Args:
        head: of the columns.
        rows: their cells.
        words: positions of the columns that are words.
        caption: above the table.
        notes: below it, a paragraph each.

    Returns:
        HTML in which all of these are text.
    """

    def cell(k: int, text: str, tag: str) -> str:
        return f"<{tag}{_LEFT if k in words else ''}>{html.escape(text)}</{tag.split()[0]}>"

    heads = "".join(cell(k, text, "th scope='col'") for k, text in enumerate(head))
    row_head = "th scope='row'"
    body = "".join(
        f"<tr>{cell(0, row[0], row_head)}{''.join(cell(k, text, 'td') for k, text in enumerate(row) if k)}</tr>"
        for row in rows
    )
    above = f"<caption{_LEFT}>{html.escape(caption)}</caption>" if caption else ""
    below = "".join(map(paragraph, notes))
    return f"<table{_RIGHT}>{above}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{below}"


def paragraph(text: str) -> str:
    """A line of text for a notebook."""
    return f"<p>{html.escape(text)}</p>"
