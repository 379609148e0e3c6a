"""What was read from a file: a matrix that can do all that it could when it was saved."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch

from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.matrices.stored import MARKS, Stored, decoded
from fisherviz.network.space import ParameterSpace


class Origin(Protocol):
    """What a matrix can be made from: a `Fisher`."""

    space: ParameterSpace
    kind: str
    reduction: str
    data: Any

    @property
    def examples(self) -> int:
        """Number of examples; counting them makes their digest."""

    @property
    def weights_fingerprint(self) -> str:
        """Digest of the model's parameters and buffers."""


class SavedMatrix(LayeredMatrix):
    """A matrix that was read from a file; made by `load_approximation`.

    Attributes:
        name: the method, "" for a matrix that is no approximation itself, such as a damped one.
        kind: the Fisher's kind, likewise.
        reduction: the Fisher's reduction, likewise.
        fingerprints: digests of the "weights" and the "data" that it was made from, "" where the file has none: of a
            matrix that is no approximation itself, of data that cannot be read twice.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored.space, stored.operator, stored.what["title"])
        self.name, self.kind, self.reduction = (stored.what[name] for name in ("name", "kind", "reduction"))
        self.fingerprints = {name: stored.what[name] for name in sorted(MARKS)}
        self._said = f"{stored.what['repr']}, saved by fisherviz {stored.what['version']}"

    def __repr__(self) -> str:
        return self._said

    def differs_from(self, fisher: Origin) -> list[str]:
        """What of a Fisher is not what the matrix was made from: "layers", "kind", "reduction", "weights", "data".

        What the file does not know is left out.
        """
        fisher.examples  # noqa: B018 - a pass over the data makes their fingerprint
        own = {"layers": _layers(self.space), "kind": self.kind, "reduction": self.reduction, **self.fingerprints}
        others = {
            "layers": _layers(fisher.space), "kind": fisher.kind, "reduction": fisher.reduction,
            "weights": fisher.weights_fingerprint, "data": fisher.data.fingerprint,
        }  # fmt: skip
        return [name for name, other in others.items() if own[name] and other and own[name] != other]


def _layers(space: ParameterSpace) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters, in torch order."""
    return [(place.name, tuple(place.shape)) for place in space.places]


def load_approximation(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", *, fisher: Origin | None = None
) -> SavedMatrix:
    """Read what an approximation's `save` wrote; it takes neither network nor data, and no code of the file is run.

    Args:
        path: the file.
        device: where the matrix is to live.
        fisher: the Fisher that the matrix has to be an approximation of; None: any.

    Returns:
        The matrix: `@`, `solve`, `damped`, `inverse`, `block`, `diagonal`, `norm`, `to_dense`, with the same numbers.

    Raises:
        ValueError: the file is not there, is no saved matrix, is damaged, a newer release wrote it, or it was made from
            other layers, weights or data, or for another kind or reduction, than those of `fisher`, which are named.
        TypeError: the path is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a path is a string or a Path, got {type(path).__name__}.")
    matrix = SavedMatrix(decoded(path, torch.device(device)))
    if fisher is not None and (other := matrix.differs_from(fisher)):
        raise ValueError(
            f"{path} was made with other {' and other '.join(other)} than this Fisher's; make the approximation again, "
            "or load it without fisher=."
        )
    return matrix
