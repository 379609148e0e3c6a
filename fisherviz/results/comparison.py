"""The result of a comparison: plain labelled data, saved and loaded, independent of any model.

A `Comparison` holds a tidy table, a dictionary of facts and the arrays that pictures need.
Every plot and the page are drawn from it alone; its three files are the contract with all who read them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fisherviz.results import metrics
from fisherviz.results.outputs import output
from fisherviz.results.summary import ERROR, Summary
from fisherviz.support import files, opening
from fisherviz.support.checksums import opened_json, sealed_json
from fisherviz.support.names import readable, unwritable
from fisherviz.support.numbers import three_digits
from fisherviz.support.tables import counted, html_table, text_table

COLUMNS = ("method", "row", "col", "metric", "value", "stderr")
WHOLE = "all"
_LAYER = " (layer)"
EXACT = "exact"
"""Label of what belongs to the exact Fisher itself, in the column of methods and among the arrays."""
FORMAT = 2
"""1: `passes` were timed, not counted."""
TABLE, FACTS, ARRAYS = "comparison.parquet", "comparison.json", "arrays.npz"


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("name"), str) for each in value
    )


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


_FORMS: dict[str, Callable[[Any], bool]] = {
    "layers": _named, "left_out": _named, "notes": _is(list), "settings": _is(dict), "fingerprints": _is(dict),
    "cumulants": _is(dict), "parameters": _is(int), "examples": _is(int), "kind": _is(str),
}  # fmt: skip
"""What others read of `meta` without asking."""


def row_label(layer: str) -> str:
    """What a layer is called in the table: its name, unless the whole matrix or another layer is called so."""
    own = layer
    while own.endswith(_LAYER):
        own = own.removesuffix(_LAYER)
    return f"{layer}{_LAYER}" if own == WHOLE else layer


def check_names(names: Iterable[Any]) -> None:
    """Refuse names of methods and layers that no file can hold."""
    for name in names:
        if why := unwritable(str(name)):
            raise ValueError(f"the name {name!r} holds {why}; rename the method or the layer.")


class Comparison:
    """How far each approximation is from the exact Fisher, per pair of layers and as a whole.

    Args:
        frame: tidy table with columns method, row, col, metric, value, stderr; row and col are names of layers, or
            both "all" for the whole matrix. `stderr` is the standard error of an estimated value, 0 of an exact one,
            and of seconds half the range of several fits; a table without that column, as earlier releases saved it,
            has exact values only.
        meta: facts about the run (layers, settings, versions, fingerprints, notes), as JSON holds them.
        arrays: name ("heatmap/exact", "spectrum/kfac", ...) to array, what pictures are drawn from.

    Raises:
        ValueError: a column is missing, a value is not a number, or `meta` does not fit into JSON.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        meta: Mapping[str, Any] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.frame = _checked_frame(frame)
        self.meta: dict[str, Any] = _checked_meta(dict(meta or {}))
        self.arrays = {str(name): np.asarray(a, dtype=np.float32) for name, a in (arrays or {}).items()}

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order in which they were compared."""
        return tuple(name for name in dict.fromkeys(self.frame["method"]) if name != EXACT)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that have a row, in order of first appearance."""
        return tuple(dict.fromkeys(self.frame["metric"]))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the matrix."""
        if self.meta.get("layers"):
            return tuple(layer["name"] for layer in self.meta["layers"])
        return tuple(name for name in dict.fromkeys(self.frame["row"]) if name != WHOLE)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out and what was assumed, a sentence each."""
        return tuple(str(note) for note in self.meta.get("notes") or ())

    @property
    def damping(self) -> str:
        """The damping of its inverses and directions, as pictures name it: "λ = 0.01", or "" where it is not known."""
        strength = self.meta.get("damping")
        if not isinstance(strength, int | float):
            return ""
        factored = str(self.meta.get("settings", {}).get("damping", "")).startswith("FactoredTikhonov")
        return f"λ = {three_digits(strength)}{', factored' if factored else ''}"

    def whole(self, metric: str, column: str = "value") -> dict[str, float]:
        """One metric of the whole matrix.

        Args:
            metric: its name.
            column: "value", or "stderr" for the standard errors (of seconds half the range), 0 where the value is
                exact.

        Returns:
            Method to value; methods to which the metric does not apply are absent.
        """
        frame = self.frame
        rows = frame[(frame["metric"] == metric) & (frame["row"] == WHOLE) & (frame["col"] == WHOLE)]
        return dict(zip(rows["method"], rows[column].astype(float), strict=True))

    def blocks(self, metric: str, *, diagonal: bool = True) -> pd.DataFrame:
        """One metric block by block.

        Args:
            metric: its name.
            diagonal: keep only the blocks of a layer with itself.

        Returns:
            The rows of `frame` concerned, in its order.
        """
        frame = self.frame
        keep = (frame["metric"] == metric) & ~((frame["row"] == WHOLE) & (frame["col"] == WHOLE))
        if diagonal:
            keep &= frame["row"] == frame["col"]
        return frame[keep].reset_index(drop=True)

    def summary(self, *, stderr: bool = True) -> Summary:
        """One row per method with the metrics of the whole matrix, smallest relative Frobenius error first.

        Args:
            stderr: put the standard errors of an estimated metric beside it, as a column "<metric>_stderr".

        Returns:
            Table indexed by method, which prints all its numbers in the width there is. A metric that does not apply
            to a method is a missing cell (`pd.NA`). What was left out and why is in its `attrs["notes"]`, and in the
            comparison's `notes`.
        """
        columns = {name: self.whole(name) for name in self.metrics}
        columns = {name: values for name, values in columns.items() if values.keys() & set(self.methods)}
        order = [name for name in metrics.METRICS if name in columns]
        order += [name for name in columns if name not in metrics.METRICS]
        table = pd.DataFrame(index=pd.Index(self.methods, name="method"))
        for name in order:
            values = [columns[name].get(method) for method in self.methods]
            complete = all(value is not None for value in values)
            table[name] = pd.array(values, dtype="float64" if complete else "Float64")
            errors = self.whole(name, "stderr") if stderr else {}
            if any(errors.values()):
                table[f"{name}{ERROR}"] = pd.array([errors.get(m) for m in self.methods], dtype=table[name].dtype)
        if "relative_frobenius" in table:
            table = table.sort_values("relative_frobenius", kind="stable", na_position="last")
        table.attrs["notes"] = list(self.notes)
        return Summary.of(table)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write comparison.parquet, comparison.json and arrays.npz into a directory, all three or none.

        Args:
            path: the directory; made if needed. What is killed in the middle leaves the old result in place.

        Returns:
            The directory.

        Raises:
            ValueError: nothing can be written there.
        """
        return files.write_together(path, self.to_files())

    def to_files(self) -> dict[str, bytes]:
        """The three files' names and contents, for callers that commit them together with other files."""
        check_names(self.arrays)
        table, arrays = io.BytesIO(), io.BytesIO()
        self.frame.to_parquet(table, index=False)
        try:
            with zipfile.ZipFile(arrays, "w") as archive:
                for name, array in self.arrays.items():  # as np.savez_compressed, in a third of its time
                    entry = io.BytesIO()
                    np.lib.format.write_array(entry, array, allow_pickle=False)
                    place = zipfile.ZipInfo(f"{name}.npy")  # without the time of day
                    archive.writestr(place, entry.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=1)
        except ValueError as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # within an entry: the archive refuses to be closed
                raise error.__context__ from None
            raise
        contents = {TABLE: table.getvalue(), ARRAYS: arrays.getvalue()}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        facts = {"format": FORMAT, "sha256": digests, "meta": self.meta}
        return {**contents, FACTS: (sealed_json(facts, indent=1) + "\n").encode()}

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the comparison as one self-contained page that needs neither network nor scripts.

        Args:
            path: the file to write.

        Returns:
            The file.

        Raises:
            ValueError: it is a directory, or nothing can be written there; said before anything is drawn.
        """
        return output("page")(path, self)

    def __repr__(self) -> str:
        kind = self.meta.get("kind", "")
        size = f", {counted(self.meta['parameters'], 'parameter')}" if "parameters" in self.meta else ""
        best = self.summary()
        closest = f", closest: {readable(str(best.index[0]))}" if "relative_frobenius" in best and len(best) else ""
        left_out = sum("left out" in note for note in self.notes)
        said = f", {left_out} left out: see .notes" if left_out else ""
        return (
            f"Comparison({counted(len(self.methods), 'method')}, {counted(len(self.layers), 'layer')}{size}"
            f"{', ' + kind + ' Fisher' if kind else ''}{closest}{said})"
        )

    def __str__(self) -> str:
        """The line of `repr` and the numbers that there is room for."""
        names, rows = self._brief().cells()
        more = len(self.summary(stderr=False).columns) - len(names)
        said = f"\n{counted(more, 'more metric')} in .summary()" if more else ""
        heads = [head.replace(", ", ",\n") for head in _heads(names)]
        return f"{self!r}\n{text_table(heads, rows, width=80)}{said}"

    def _brief(self) -> Summary:
        """The few metrics that matter most; all of them where there are no more than few."""
        table = self.summary()
        names = {str(name).removesuffix(ERROR) for name in table}
        shown = names if len(names) <= len(metrics.BRIEF) else names & set(metrics.BRIEF)
        return table[[name for name in table if str(name).removesuffix(ERROR) in shown]]

    def _repr_html_(self) -> str:
        names, rows = self.summary().cells()
        return html_table(_heads(names), rows, caption=repr(self), notes=self.notes)


def _heads(names: Sequence[str]) -> list[str]:
    return ["method", *(metrics.metric(name).short for name in names)]


def load_comparison(path: str | os.PathLike[str]) -> Comparison:
    """Read what `Comparison.save` wrote.

    Args:
        path: the directory.

    Returns:
        The comparison, equal to the one saved.

    Raises:
        ValueError: there is none, its files do not belong together, or a newer release wrote it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a path is a string or a Path, got {type(path).__name__}.")
    directory = Path(path)
    contents = {}
    # who writes meanwhile writes there, or into the report around it
    with files.held(directory, shared=True), files.held(directory.parent, shared=True):
        for name in (FACTS, TABLE, ARRAYS):
            try:
                contents[name] = files.resolve(directory, name).read_bytes()
            except OSError as error:
                raise ValueError(
                    f"{directory} holds no saved comparison: {name} cannot be read ({error.strerror or error}); "
                    "give the directory that Comparison.save or `fisherviz report` wrote."
                ) from error
    try:
        facts = opened_json(contents[FACTS].decode())
        version, digests, meta = int(facts["format"]), dict(facts["sha256"]), dict(facts["meta"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{directory / FACTS} is damaged or not a comparison's ({error}); save it again.") from error
    if wrong := [name for name, fits in _FORMS.items() if meta.get(name) is not None and not fits(meta[name])]:
        raise ValueError(
            f"{directory / FACTS} is damaged: its {wrong[0]} are not what a comparison says; save it again."
        )
    if version > FORMAT:
        raise ValueError(f"{directory} is in format {version}, this release reads up to {FORMAT}; upgrade fisherviz.")
    for name in (TABLE, ARRAYS):
        if hashlib.sha256(contents[name]).hexdigest() != digests.get(name):
            raise ValueError(
                f"{directory / name} is damaged or belongs to another comparison than {FACTS}; save it again."
            )
    try:
        arrays = opening.arrays(contents[ARRAYS])
        frame = opening.table(contents[TABLE], COLUMNS[:4], COLUMNS[4:])
    except ValueError as error:
        raise ValueError(f"{directory} holds no saved comparison that fisherviz wrote: {error}.") from error
    if version < 2 and (frame["metric"] == "passes").any():
        frame = frame[frame["metric"] != "passes"]
        said = "passes are left out: an earlier release timed them where they are counted now; compare again for them."
        meta = {**meta, "notes": [*(meta.get("notes") or ()), said]}
    try:
        return Comparison(frame, meta, arrays)
    except ValueError as error:
        raise ValueError(f"{directory} holds no saved comparison that fisherviz wrote: {error}") from error


def _checked_frame(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame if "stderr" in frame else frame.assign(stderr=0.0)
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise ValueError(f"the comparison's frame lacks the columns {missing}; it needs {list(COLUMNS)}.")
    frame = frame.loc[:, list(COLUMNS)].reset_index(drop=True)
    for column in COLUMNS[:3]:
        check_names(frame[column].unique())
    frame = frame.astype(dict.fromkeys(COLUMNS[:4], str) | dict.fromkeys(COLUMNS[4:], "float64"))
    bad = frame[frame[["value", "stderr"]].isna().any(axis=1)]
    if len(bad):
        first = bad.iloc[0]
        raise ValueError(
            f"{first['metric']} of {first['method']!r} at ({first['row']}, {first['col']}) is not a number; "
            "leave the row out and say why in meta['notes']."
        )
    return frame


def _checked_meta(meta: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the comparison's meta is no JSON ({error}); use plain values.") from error
