"""Single entries of matrices too large to be dense: of a sample of the parameters, exact and approximated.

Of each layer some output units and some inputs are chosen at random; the sample has every entry among the parameters
between them, those between layers included, and is packed as the blocks of a small network are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from fisherviz.comparison.entries import COLUMN_ENTRIES, COLUMNS, entries
from fisherviz.exact.fisher import Fisher
from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.operators import Zero
from fisherviz.results import blocks
from fisherviz.results.comparison import EXACT
from fisherviz.statistics.picked import PIECE_ENTRIES, Pick, picked_moments
from fisherviz.support.memory import available
from fisherviz.support.numbers import human

MOST = 890
"""Parameters of a sample: as many as a page has room for entry by entry (`blocks.FULL`)."""
_SEED = 0
_DOUBLE = 8
_COPIES = 12
"""Float64 matrices of the sample's size that are held at once."""


class Sample:
    """The picks of all layers, and the arrays that a page shows their entries from.

    Args:
        fisher: the exact Fisher, whose captures are kept.
        most: parameters, at most, unless there are more layers.
    """

    def __init__(self, fisher: Fisher, most: int = MOST) -> None:
        self.fisher, device = fisher, fisher.network.device
        layers = fisher.space.layers
        grids = chosen([layer.matrix_shape for layer in layers], [layer.info().bias for layer in layers], most)
        self.picks = [Pick(grid.units.to(device), grid.inputs.to(device), grid.width) for grid in grids]
        self.size = sum(pick.size for pick in self.picks)
        self.cut = blocks.layout([(len(pick.units), len(pick.inputs)) for pick in self.picks])

    def why_not(self) -> str:
        """Why it does not fit in memory; "" where it does."""
        space, device = self.fisher.space, self.fisher.network.device
        item = torch.empty((), dtype=self.fisher.network.precision, device="cpu").element_size()
        largest, columns = max(space.sizes), max(pick.size for pick in self.picks)
        needed = _DOUBLE * (_COPIES * self.size**2 + 3 * PIECE_ENTRIES)
        needed += item * COLUMNS * max(largest, min(COLUMN_ENTRIES, largest * columns))
        free = available(device)
        return f"it takes {human(needed)} where {human(free)} may be taken" if needed > free else ""

    @cached_property
    def exact(self) -> np.ndarray:
        """The entries of the exact Fisher, (S, S) in unit order."""
        captures = list(self.fisher.example_space().values())
        return picked_moments(captures, self.picks).mul_(self.fisher.scale).cpu().numpy()

    def matrix_of(self, approximation: LayeredMatrix) -> np.ndarray:
        """The entries of an approximation, (S, S) in unit order."""
        edges = np.cumsum([0, *(pick.size for pick in self.picks)]).tolist()
        matrix = np.zeros((self.size, self.size))
        for i, row in enumerate(self.picks):
            for j in range(i, len(self.picks)):
                operator = approximation.operator(i, j)
                if isinstance(operator, Zero):
                    continue
                found = entries(operator, row, self.picks[j]).double().cpu().numpy()
                rows, cols = slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1])
                matrix[cols, rows] = found.T
                matrix[rows, cols] = found
        return matrix

    def exact_arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the exact Fisher, the layout and what was chosen."""
        units, inputs = ([getattr(pick, side) for pick in self.picks] for side in ("units", "inputs"))
        return {
            "blocks_layout": self.cut.to_array(),
            "sample_units": blocks.digits(torch.cat(units).cpu().numpy()),
            "sample_inputs": blocks.digits(torch.cat(inputs).cpu().numpy()),
            **self._arrays(EXACT, self.exact, None),
        }

    def arrays_of(self, label: str, approximation: LayeredMatrix) -> dict[str, np.ndarray]:
        """The arrays of an approximation."""
        return self._arrays(label, self.matrix_of(approximation), self.exact)

    def _arrays(self, label: str, matrix: np.ndarray, exact: np.ndarray | None) -> dict[str, np.ndarray]:
        packed = blocks.pack(matrix, exact, self.cut)
        return dict(zip((f"blocks/{label}", f"entries/{label}"), packed, strict=True))


def chosen(shapes: Sequence[tuple[int, int]], biased: Sequence[bool], most: int) -> list[Pick]:
    """Sub-grids of the layers' W̄, at random but always the same; small layers as a whole.

    Args:
        shapes: (d_out, da) of each layer.
        biased: whether the last column is a bias, which is then among the chosen.
        most: parameters together, at most, unless there are more layers.

    Returns:
        One for each layer.
    """
    sizes = [units * inputs for units, inputs in shapes]
    share, left = [0] * len(sizes), most
    for done, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        share[i] = min(sizes[i], max(1, left // (len(sizes) - done)))
        left -= share[i]
    source = random.Random(_SEED)
    return [_grid(shape, bias, mine, source) for shape, bias, mine in zip(shapes, biased, share, strict=True)]


def _grid(shape: tuple[int, int], biased: bool, share: int, source: random.Random) -> Pick:
    """About as many units as inputs, no more than `share` parameters."""
    units, inputs = shape
    rows = min(units, max(1, round(share**0.5)))
    cols = min(inputs, max(1, share // rows))
    rows = min(units, max(1, share // cols))
    last = [inputs - 1] if biased and cols > 1 else []
    of = sorted(source.sample(range(inputs - len(last)), cols - len(last))) + last
    return Pick(
        torch.tensor(sorted(source.sample(range(units), rows)), device="cpu"), torch.tensor(of, device="cpu"), inputs
    )
