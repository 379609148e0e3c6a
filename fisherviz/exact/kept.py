"""What earlier requests to an exact Fisher have left for later ones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from fisherviz.capture.captures import AnyCapture
from fisherviz.network.layers import Layer
from fisherviz.operators.factorise import DampedCholesky
from fisherviz.statistics import Statistic
from fisherviz.statistics.examples import Woodbury


@dataclass
class Kept:
    """What is kept, valid for one set of the layers' paths."""

    layers: tuple[Layer, ...]
    statistics: dict[Hashable, tuple[Statistic, int]] = field(default_factory=dict)
    captures: dict[str, AnyCapture] | None = None
    ragged: bool = False
    joint: dict[str, AnyCapture] | None = None
    """Captures with the scores of the data's labels as the last vector."""
    gradient: Tensor | None = None
    """Summed over the examples, flat in torch order."""
    matrix: Tensor | None = None
    """Dense, in torch order; never handed out."""
    solver: tuple[tuple[str, float], DampedCholesky | Woodbury] | None = None
