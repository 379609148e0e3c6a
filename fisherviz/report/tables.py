"""The page's tables as plain rows: heads, cells as text, and which cell is the best of its column.

Whole-matrix summary in groups of columns, one metric per layer, what was probed, and the facts of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from fisherviz.support.names import readable
from fisherviz.support.numbers import show_number

GROUPS = (
    ("relative error of F̂, and cosine with F", ("", "matrix")),
    ("what an optimizer feels", ("damping", "direction")),
    ("cost", ("cost",)),
)
"""Neighbouring columns, by what their metrics need."""
WIDEST = 8  # layers that still make columns; more become rows


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Heads and rows; each row begins with its own head.

    Args:
        caption: what the table shows.
        corner: head of the column of row heads.
        heads: of the other columns.
        rows: head of the row and its cells.
        groups: title and width of neighbouring columns that belong together.
        names: of the metrics under the heads, where each head is one.
    """

    caption: str
    corner: str
    heads: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]
    groups: list[tuple[str, int]] = field(default_factory=list)
    names: tuple[str, ...] = ()


def summary_table(comparison: Comparison, only: Sequence[str] | None = None) -> Table | None:
    """The metrics of the whole matrix, one row per method, closest first.

    Args:
        comparison: where they are.
        only: names of the metrics to show; None: all.

    Returns:
        The table, or None if there are no such metrics.
    """
    summary = comparison.summary(stderr=False)
    summary = summary[[name for name in summary if only is None or name in only]]
    known = [name for name in summary if name in metrics.METRICS and name != "seconds"]  # passes tell the same
    others = [name for name in summary if name not in metrics.METRICS]
    groups = [(title, [name for name in known if metrics.metric(name).needs in needs]) for title, needs in GROUPS]
    groups = [(title, names) for title, names in [*groups, ("also measured", others)] if names]
    columns = [name for _, names in groups for name in names]
    if not columns:
        return None
    return Table(
        "Whole matrix, closest first; the best of each column is bold.", "method",
        tuple(metrics.metric(name).short for name in columns),
        _rows(summary[columns], columns, [comparison.whole(name, "stderr") for name in columns]),
        [(_with_damping(title, names, comparison), len(names)) for title, names in groups],
        tuple(columns),
    )  # fmt: skip


def _with_damping(title: str, names: Sequence[str], comparison: Comparison) -> str:
    """A title that says at which λ its numbers were measured, if they depend on it."""
    if not any(metrics.metric(name).needs in GROUPS[1][1] for name in names):
        return title
    return f"{title}, {comparison.damping or 'each layer at its own λ (see the notes)'}"


def layer_tables(comparison: Comparison) -> list[Table]:
    """One table per metric that was measured layer by layer: methods are rows, layers columns."""
    tables = []
    for name in comparison.metrics:
        rows = comparison.blocks(name)
        if rows.empty or metrics.metric(name).needs == "cost":
            continue
        grid, errors = (
            rows.pivot_table(index="method", columns="row", values=column, sort=False) for column in ("value", "stderr")
        )
        layers = [layer for layer in comparison.layers if layer in grid]
        far = metrics.metric(name).away(grid).median(axis=1)
        grid = grid.loc[far.sort_values(kind="stable").index, layers]
        table = Table(
            _with_damping(metrics.metric(name).title, [name], comparison),
            "method",
            tuple(map(readable, layers)),
            _rows(grid, [name] * len(layers), [errors[layer] for layer in layers]),
        )
        tables.append(table if len(layers) <= WIDEST else _turned(table, "layer"))
    return tables


def _turned(table: Table, corner: str) -> Table:
    """The same table with rows and columns exchanged."""
    heads = tuple(head for head, _ in table.rows)
    rows = [(head, [cells[k] for _, cells in table.rows]) for k, head in enumerate(table.heads)]
    return Table(table.caption, corner, heads, rows)


def probed_table(comparison: Comparison) -> Table | None:
    """Which layers were attached, by which path, with which parameters."""
    layers: Sequence[dict[str, Any]] = comparison.meta.get("layers") or []
    if not layers:
        return None
    rows = []
    for layer in layers:
        fan = f"{layer.get('in_features', 0)} → {layer.get('out_features', 0)}"
        texts = (
            str(layer.get("kind", "")),
            ": ".join(str(layer[key]) for key in ("path", "skipped_reason") if layer.get(key)),
            fan if layer.get("out_features") else metrics.MISSING,
            "yes" if layer.get("bias") else "no",
            f"{layer.get('num_parameters', 0):,}",
            ", ".join(layer.get("parameters", [])),
        )
        rows.append((readable(str(layer["name"])), [Cell(text) for text in texts]))
    heads = ("kind", "path", "fan-in → units", "bias", "parameters", "their names")
    return Table("What was attached, and by which path.", "layer", heads, rows)


def left_out_table(comparison: Comparison) -> Table | None:
    """What was not probed, and why."""
    rows = [(str(item["name"]), [Cell(str(item["why"]))]) for item in comparison.meta.get("left_out") or []]
    return Table("What was left out, and why.", "name", ("why",), rows) if rows else None


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Settings, versions and fingerprints as pairs of texts."""
    meta = comparison.meta
    pairs = []
    words = {
        "likelihood": "likelihood", "kind": "kind of Fisher", "samples": "sampled labels per example",
        "reduction": "over examples", "damping": "damping λ", "examples": "examples",
        "parameters": "parameters compared",
    }  # fmt: skip
    for key, label in words.items():
        if meta.get(key) is None or (key == "samples" and meta.get("kind") != "mc"):
            continue
        named = key == "damping" and comparison.damping.removeprefix("λ = ")
        pairs.append((label, named or _plain(meta[key])))
    if meta.get("forward_backward_seconds"):
        seconds = metrics.show("seconds", float(meta["forward_backward_seconds"]))
        pairs.append(("one forward and backward pass", seconds))
    if timed := meta.get("fits_timed"):
        pairs.append(("fits that seconds are taken from", f"the median of {timed}" if timed > 1 else "1, so no spread"))
    pairs += [(str(key), _plain(value)) for key, value in (meta.get("settings") or {}).items()]
    pairs += [(f"fingerprint of the {key}", str(value)) for key, value in (meta.get("fingerprints") or {}).items()]
    pairs += [(key, str(meta[key])) for key in ("created", "fisherviz", "torch") if meta.get(key)]
    return pairs


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return show_number(value)
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _rows(
    grid: pd.DataFrame, names: Sequence[str], errors: Sequence[Mapping[str, float]]
) -> list[tuple[str, list[Cell]]]:
    """Rows of a table from one whose columns hold the metrics of these names, with their standard errors by method."""
    columns = [_column(name, grid.iloc[:, k], errors[k]) for k, name in enumerate(names)]
    return [(str(method), [column[row] for column in columns]) for row, method in enumerate(grid.index)]


def _column(name: str, values: pd.Series, errors: Mapping[str, float]) -> list[Cell]:
    """Cells of one metric; the best are those that read like the best."""
    texts = [metrics.MISSING if pd.isna(value) else metrics.show(name, float(value)) for value in values]
    far = metrics.metric(name).away(values.astype(float)).to_numpy()
    ranked = metrics.metric(name).best != "none" and np.isfinite(far).sum() > 1
    winner = texts[int(np.argmin(np.where(np.isfinite(far), far, np.inf)))] if ranked else None
    shown = [
        text if pd.isna(value) else metrics.show(name, float(value), errors[method])
        for text, (method, value) in zip(texts, values.items(), strict=True)
    ]
    return [Cell(full, text == winner) for full, text in zip(shown, texts, strict=True)]
