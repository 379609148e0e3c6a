"""Metrics for TensorBoard, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fisherviz.support.errors import OptionError

FOLDER = "tensorboard"


class Board:
    """Writes numbers of metrics to TensorBoard.

    Args:
        path: the run's folder.
        wanted: True, False, or None for where it is installed.
        step: step that the run continues from; later ones that a killed process wrote are dropped.

    Raises:
        ValueError: it is wanted and not installed.
    """

    def __init__(self, path: Path, wanted: bool | None, step: int) -> None:
        self._writer: Any = None
        installed = importlib.util.find_spec("tensorboard") is not None
        if wanted and not installed:
            raise OptionError(
                'tensorboard: it is not installed; run pip install "fisherviz[tensorboard]" or leave it out.'
            )
        if wanted is False or not installed:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path / FOLDER), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        """One line of metrics."""
        if self._writer is None:
            return
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "epoch"):
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])
        for key, value in record.get("seconds", {}).items():
            self._writer.add_scalar(f"seconds/{key}", value, record["step"])

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
