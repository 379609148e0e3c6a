"""A comparison's summary: a DataFrame whose numbers all show, in whatever width there is, as people read them.

Selections of it show alike; what holds other numbers than those of the comparison (ranks, ratios, rounded ones) has
none of their units, and shows as any DataFrame.
"""

from __future__ import annotations

import shutil
from typing import Any

import pandas as pd

from fisherviz.results import metrics
from fisherviz.support.tables import html_table, text_table

ERROR = "_stderr"
"""Ends the name of the column with a metric's standard errors."""


class Summary(pd.DataFrame):
    """One row per method, one column per metric; values to three digits with their unit, errors behind ±."""

    _metadata = ["measured"]  # noqa: RUF012 - pandas' way to hand an attribute on to selections
    measured: pd.DataFrame

    @classmethod
    def of(cls, table: pd.DataFrame) -> Summary:
        """A comparison's numbers: indexed by method, a column per metric and per standard error."""
        made = cls(table)
        made.attrs = dict(table.attrs)  # the notes, which a constructor does not take along
        made.measured = pd.DataFrame(table)
        return made

    @property
    def _constructor(self) -> type[Summary]:
        return Summary

    @property
    def _is_summary(self) -> bool:
        measured = getattr(self, "measured", None)
        if measured is None or self.index.name != "method" or not self.columns.is_unique:
            return False
        if not (self.index.isin(measured.index).all() and self.columns.isin(measured.columns).all()):
            return False
        return pd.DataFrame(self).equals(measured.loc[self.index, self.columns])

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The metrics' names, and a row of texts per method, its name first."""
        names = [name for name in self.columns if not (name.endswith(ERROR) and name.removesuffix(ERROR) in self)]
        rows = [[str(method)] for method in self.index]
        for name in names:
            errors = self[f"{name}{ERROR}"] if f"{name}{ERROR}" in self else [0.0] * len(self)
            for row, value, error in zip(rows, self[name], errors, strict=True):
                shown = (
                    metrics.show(name, float(value), 0.0 if pd.isna(error) else float(error))
                    if pd.notna(value)
                    else metrics.MISSING
                )
                row.append(shown)
        return names, rows

    def __repr__(self) -> str:
        if not self._is_summary:
            return super().__repr__()
        names, rows = self.cells()
        head = ["method", *(name.replace("_", "\n") for name in names)]
        return text_table(head, rows, width=shutil.get_terminal_size((80, 24)).columns)

    def _repr_html_(self) -> Any:
        if not self._is_summary:
            return super()._repr_html_()
        names, rows = self.cells()
        return html_table(["method", *(name.replace("_", " ") for name in names)], rows)
