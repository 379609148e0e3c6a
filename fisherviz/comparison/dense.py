"""Comparison of matrices small enough to be dense: every metric, in float64, whole and block by block.

Also gathers the arrays that pictures need: heatmaps reduced to a few hundred cells, block means and spectra.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fisherviz.approximations import FAILURES, Approximation
from fisherviz.comparison.measures import Cost, DenseMatrix, DensePair, Question, measured
from fisherviz.operators.factorise import eigenvalues
from fisherviz.results import blocks
from fisherviz.results.cells import LIMIT, reduce_matrix
from fisherviz.results.comparison import EXACT, WHOLE, row_label
from fisherviz.support.errors import sentence

Row = tuple[str, str, str, float, float]
_SINGULAR = {"relative_spectral", "relative_nuclear"}
_SMALL = 256
"""Singular values of larger blocks between layers cost more than all the rest: only where metrics were named."""
_MAX_PAIRS = 400
"""Off-diagonal blocks have rows of their own while there are at most this many."""


class DenseComparison:
    """Measures approximations of one Fisher, all matrices dense in unit order."""

    def __init__(self, question: Question) -> None:
        self.question, self.space = question, question.fisher.space
        self.labels = [row_label(name) for name in self.space.names]
        self.notes: list[str] = []
        self.arrays: dict[str, np.ndarray] = {}
        matrix = symmetrised(question.fisher.to_dense("unit").double())
        slope = question.gradient
        self.slope = None if slope is None else slope.double()[self.space.permutation("unit").to(slope.device)]
        damped = matrix.clone()
        damped.diagonal().add_(question.strength)
        self.exact = DenseMatrix(matrix, True, damped)
        n = len(self.space.layers)
        pairs = [(i, j) for i in range(n) for j in range(n) if i == j or n * n <= _MAX_PAIRS]
        if n * n > _MAX_PAIRS:
            self.notes.append(f"blocks between layers have no rows of their own: {n * (n - 1):,} of them.")
        large = [i for i in self.space.sizes if i > _SMALL]
        if len(large) > 1 and not question.explicit and question.wanted & _SINGULAR:
            self.notes.append(
                f"relative_spectral and relative_nuclear of blocks between layers of more than {_SMALL} parameters "
                "are left out; ask for them with metrics=."
            )
        self.blocks = {pair: self._block(matrix, damped, *pair) for pair in pairs}
        self.cut = blocks.layout([layer.matrix_shape for layer in self.space.layers])
        self.arrays["blocks_layout"] = self.cut.to_array()
        self.arrays["blocks_torch"] = np.concatenate([self.space.own_permutation(i, "torch").numpy() for i in range(n)])
        self._gather(EXACT, matrix, self.exact.inverse)
        edges = np.array(self.space.offsets, dtype=np.float64)
        factor = -(-self.space.size // LIMIT)
        self.arrays["heatmap_edges"] = edges / factor
        self.arrays["heatmap_unit_edges"] = self._unit_edges() / factor

    def _range(self, i: int) -> slice:
        return slice(self.space.offsets[i], self.space.offsets[i + 1])

    def _block(self, matrix: Tensor, damped: Tensor | None, i: int, j: int) -> DenseMatrix:
        rows, cols = self._range(i), self._range(j)
        part = damped[rows, cols].contiguous() if damped is not None and i == j else None
        return DenseMatrix(matrix[rows, cols], i == j, part)

    def _unit_edges(self) -> np.ndarray:
        edges: list[float] = []
        for layer, start in zip(self.space.layers, self.space.offsets, strict=False):
            if layer.structured:
                edges += [start + k * layer.da for k in range(1, layer.d_out)]
        return np.array(edges, dtype=np.float64)

    def prepare(self, fitted: Mapping[str, Approximation]) -> None:
        """Nothing: the matrices are there."""

    def rows(self, label: str, approximation: Approximation, cost: Cost) -> list[Row]:
        """All rows (row, col, metric, value, standard error) of a fitted approximation."""
        matrix = symmetrised(approximation.to_dense("unit").double())
        damped: Tensor | None = None
        try:
            damped = symmetrised(approximation.damped(self.question.rule).to_dense("unit").double())
        except FAILURES as error:
            self.notes.append(f"damped metrics of {label} are left out: {sentence(error)}")
        own = DenseMatrix(matrix, True, None if self.exact.factor is None else damped)
        whole = DensePair(self.exact, own, self.slope, cost)
        if damped is not None and own.factor is None:
            self.notes.append(f"damped metrics of {label} are left out: with this damping it is not positive definite.")
        wanted = self.question.wanted
        out: list[Row] = [(WHOLE, WHOLE, *found) for found in measured(whole, wanted)]
        for (i, j), exact in self.blocks.items():
            block = self._block(matrix, damped if exact.frobenius > 0 and exact.factor is not None else None, i, j)
            pair = DensePair(exact, block, None if self.slope is None else self.slope[self._range(i)])
            small = i == j or self.question.explicit or min(block.matrix.shape) <= _SMALL
            found = measured(pair, wanted if small else wanted - _SINGULAR)
            out += [(self.labels[i], self.labels[j], *each) for each in found]
        self._gather(label, matrix, own.inverse)
        return out

    def _gather(self, label: str, matrix: Tensor, inverse: Tensor | None) -> None:
        self.arrays[f"spectrum/{label}"] = self._spectrum(label, matrix).cpu().numpy()
        for kind, away, means, exact, own in (
            ("heatmap", "difference", "block_means", self.exact.matrix, matrix),
            ("inverse", "inverse-difference", "block_means_inverse", self.exact.inverse, inverse),
        ):
            if own is not None:
                self.arrays[f"{kind}/{label}"] = self._reduced(own)
                self.arrays[f"{means}/{label}"] = self._means(own)
                reference = None if label == EXACT or exact is None else exact.cpu().numpy()
                packed = blocks.pack(own.cpu().numpy(), reference, self.cut)
                suffix = "_inverse" if kind == "inverse" else ""
                self.arrays[f"blocks{suffix}/{label}"], self.arrays[f"entries{suffix}/{label}"] = packed
            if own is not None and exact is not None and label != EXACT:
                self.arrays[f"{away}/{label}"] = self._reduced(exact - own)

    def _reduced(self, matrix: Tensor) -> np.ndarray:
        return reduce_matrix(matrix.cpu().numpy(), -(-self.space.size // LIMIT))

    def _spectrum(self, label: str, matrix: Tensor) -> Tensor:
        """Eigenvalues, descending; layer by layer where nothing couples the layers."""
        if label == EXACT:
            return self.exact.eigenvalues.flip(0)
        n = len(self.space.layers)
        coupled = any(bool(matrix[self._range(i), self._range(j)].any()) for i in range(n) for j in range(i + 1, n))
        parts = [slice(0, self.space.size)] if coupled else [self._range(i) for i in range(n)]
        values = torch.cat([eigenvalues(matrix[part, part]) for part in parts])
        return values.sort(descending=True).values

    def _means(self, matrix: Tensor) -> np.ndarray:
        n = len(self.space.layers)
        rows = [[float(matrix[self._range(i), self._range(j)].abs().mean()) for j in range(n)] for i in range(n)]
        return np.array(rows)


def symmetrised(matrix: Tensor) -> Tensor:
    """The symmetric part."""
    return (matrix + matrix.T) / 2
