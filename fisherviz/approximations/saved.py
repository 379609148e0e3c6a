"""What was read from a file: a matrix that can do all that it could when it was saved."""

from __future__ import annotations

import os

import torch

from fisherviz.approximations.matrices import LayeredMatrix
from fisherviz.approximations.stored import Stored, decoded


class SavedMatrix(LayeredMatrix):
    """A matrix that was read from a file; made by `load_approximation`.

    Attributes:
        name: the method, "" for a matrix that is no approximation itself, such as a damped one.
        kind: the Fisher's kind, likewise.
        reduction: the Fisher's reduction, likewise.
        plot_order: the order of the paper that the method comes from, for plots.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored.space, stored.operator)
        self.name, self.kind, self.reduction = (stored.what[name] for name in ("name", "kind", "reduction"))
        self.plot_order = stored.what["plot_order"]
        self._said = f"{stored.what['repr']}, saved by fisherviz {stored.what['version']}"

    def __repr__(self) -> str:
        return self._said


def load_approximation(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> SavedMatrix:
    """Read what an approximation's `save` wrote; it takes neither network nor data, and no code of the file is run.

    Args:
        path: the file.
        device: where the matrix is to live.

    Returns:
        The matrix: `@`, `solve`, `damped`, `inverse`, `block`, `diagonal`, `norm`, `to_dense`, with the same numbers.

    Raises:
        ValueError: the file is not there, is no saved matrix, is damaged, or a newer release wrote it.
        TypeError: the path is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a path is a string or a Path, got {type(path).__name__}.")
    return SavedMatrix(decoded(path, torch.device(device)))
