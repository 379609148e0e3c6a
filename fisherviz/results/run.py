"""What a training run leaves in its folder: metrics.jsonl, config.yaml, summary.json; `training` writes it.

Lines of metrics have a kind: "step", "epoch" or "monitor". Everything that depends on the clock is in a
line's "seconds".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fisherviz.support.checksums import opened_json, opened_text
from fisherviz.support.choices import one_of
from fisherviz.support.plain import from_yaml

METRICS, CONFIG, SUMMARY, CHECKPOINT = "metrics.jsonl", "config.yaml", "summary.json", "checkpoint.pt"
MONITOR = ("method", "layer", "metric", "value")
"""What a row of a monitor's line holds."""
KINDS = ("step", "epoch", "monitor")


@dataclass(frozen=True, eq=False)
class Run:
    """One training run as its folder has it.

    Args:
        path: the folder.
        config: every field of the configuration.
        records: the lines of metrics.
        summary: how it ended; empty while it is running.
    """

    path: Path
    config: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    summary: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the run has ended as it should."""
        return self.summary.get("status") == "complete"

    @property
    def name(self) -> str:
        """The optimizer, with the options that it was given."""
        options = ", ".join(f"{k}={v}" for k, v in self.config.get("optimizer_options", {}).items())
        return f"{self.config.get('optimizer', self.path.name)}{f' ({options})' if options else ''}"

    def frame(self, kind: str = "epoch") -> pd.DataFrame:
        """The lines of one kind as a table; what was in "seconds" becomes seconds_total, seconds_forward, ...

        Args:
            kind: "epoch", "step" or "monitor" (a row per value, as `Monitor.frame`).

        Raises:
            ValueError: another kind.
        """
        one_of("kind", kind, KINDS)
        rows: list[dict[str, Any]] = []
        for record in self.records:
            if record["kind"] == kind == "monitor":
                rows += [{"step": record["step"], **dict(zip(MONITOR, row, strict=True))} for row in record["rows"]]
            elif record["kind"] == kind:
                row = {key: value for key, value in record.items() if key not in ("kind", "seconds")}
                rows.append(row | {f"seconds_{k}": v for k, v in record.get("seconds", {}).items()})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        state = self.summary.get("status", "unfinished")
        steps = self.summary.get("steps", sum(record["kind"] == "step" for record in self.records))
        return f"Run({str(self.path)!r}, {self.name}, {self.config.get('dataset')}, {steps} steps, {state})"


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a training run, finished or not; a last line that is not whole yet is left out.

    Args:
        path: its folder.

    Raises:
        ValueError: there is no run, or its files are damaged.
    """
    directory = Path(path)
    config = _read(directory, CONFIG, lambda text: from_yaml(opened_text(text)), dict)
    records = _read(directory, METRICS, _records, tuple)
    ended = _read(directory, SUMMARY, opened_json, dict) if (directory / SUMMARY).exists() else {}
    expected = ended.get("lines", len(records))
    if len(records) != expected:
        raise ValueError(
            f"{directory} holds a damaged training run: {METRICS} has {len(records)} whole lines where it had "
            f"{expected} at the run's end; restore it, or remove the folder and train again."
        )
    return Run(directory, config, records, ended)


def _read(directory: Path, name: str, opened: Callable[[str], Any], kind: type) -> Any:
    """What a file of a run holds, which must be of a type."""
    try:
        found = opened((directory / name).read_bytes().decode())
    except OSError as error:
        raise ValueError(
            f"{directory} holds no training run: {name} cannot be read; give the folder that `fisherviz train` wrote."
        ) from error
    except ValueError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{directory} holds a damaged training run: {name} cannot be read ({told}).") from error
    if not isinstance(found, kind):
        raise ValueError(f"{directory} holds a damaged training run: {name} is not what a run writes.")
    return found


def _records(text: str) -> tuple[dict[str, Any], ...]:
    """The lines that are whole."""
    records = tuple(opened_json(line) for line in text.split("\n")[:-1])
    if not all(isinstance(record, dict) and record.get("kind") in KINDS for record in records):
        raise ValueError(f"a line has no kind of {', '.join(KINDS)}")
    return records
