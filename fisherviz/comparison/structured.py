"""Comparison of matrices too large to be dense: exact Frobenius errors and cosines from example space, and directions.

‖F - F̂‖² = ‖F‖² - 2⟨F, F̂⟩ + ‖F̂‖², each term exact and accumulated in float64 (DESIGN section 6, "Errors without
materialising"). Nuclear and max norms, inverses and divergences are left out and the notes say so.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fisherviz.approximations import FAILURES, Approximation
from fisherviz.approximations.example_operator import ExampleSpace
from fisherviz.comparison.inner import inner_with_exact
from fisherviz.comparison.measures import Cost, Pair, Question, Step, measured
from fisherviz.exact.spectra import square_norms
from fisherviz.operators import Dense, Operator, Zero, extreme_eigenvalues
from fisherviz.results.comparison import WHOLE, row_label
from fisherviz.results.metrics import needing
from fisherviz.statistics.products import GRADIENT_ENTRIES

Row = tuple[str, str, str, float]
_MAX_PAIRS = 100
_SPECTRAL_PARAMETERS = 3000
"""Above this size a spectral norm by Lanczos costs hundreds of passes and has to be asked for."""
_WOODBURY_COLUMNS = 12000


class StructuredComparison:
    """Measures approximations of one Fisher without dense matrices."""

    def __init__(self, question: Question) -> None:
        self.question, self.fisher, self.space = question, question.fisher, question.fisher.space
        fisher, wanted, explicit, gradient = question.fisher, question.wanted, question.explicit, question.gradient
        self.notes: list[str] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.inner: dict[str, dict[tuple[int, int], float] | Exception] = {}
        self.square = square_norms(fisher)
        self.total = sum((1 if i == j else 2) * value for (i, j), value in self.square.items())
        left_out = sorted(wanted & needing("matrix", "damping"))
        if left_out:
            self.notes.append(
                f"{', '.join(left_out)} are left out: they need the dense "
                f"{self.space.size:,} x {self.space.size:,} matrix; ask for them with metrics=."
            )
        spectral = "relative_spectral" in wanted and (explicit or self.space.size <= _SPECTRAL_PARAMETERS)
        if "relative_spectral" in wanted and not spectral:
            self.notes.append(
                f"relative_spectral is left out for {self.space.size:,} parameters: hundreds of products with F; "
                "ask for it with metrics=."
            )
        self.largest = self._largest() if spectral else 0.0
        self.step: Tensor | None = None
        if gradient is not None and wanted & needing("direction"):
            if min(self.space.size, fisher.columns) <= _WOODBURY_COLUMNS or explicit:
                self.step = fisher.solve(gradient, question.strength)
            else:
                self.notes.append(
                    "directions are left out: the exact natural gradient needs a factorisation of size "
                    f"{min(self.space.size, fisher.columns):,}; ask for it with metrics=, or use fewer examples."
                )
        floor = (64 * torch.finfo(fisher.probe.precision).eps) ** 0.5
        self.notes.append(
            f"relative_frobenius comes from a difference of squares: below {floor:.1g} it means nothing but 'small'."
        )

    def _largest(self) -> float:
        try:
            return self.fisher.norm("spectral")
        except RuntimeError as error:  # Lanczos has not converged
            self.notes.append(f"relative_spectral is left out: {error}")
            return 0.0

    def prepare(self, fitted: Mapping[str, Approximation]) -> None:
        """What all matrices share one sweep over the gradients for."""
        blocks: dict[str, dict[tuple[int, int], Operator]] = {label: {} for label in fitted}
        for label, approximation in fitted.items():
            for place in self.square:
                if not self._is_known(place, operator := approximation.operator(*place)):
                    blocks[label][place] = operator
        self.inner = inner_with_exact(self.fisher, blocks)

    def rows(self, label: str, approximation: Approximation, cost: Cost) -> list[Row]:
        """All rows (row, col, metric, value) of a fitted approximation."""
        names = [row_label(name) for name in self.space.names]
        show_pairs = len(self.space.layers) ** 2 <= _MAX_PAIRS
        out: list[Row] = []
        sums = np.zeros(3)
        if isinstance(inner := self.inner[label], Exception):
            raise inner
        for (i, j), square in self.square.items():
            found = self._sums((i, j), approximation.operator(i, j), inner.get((i, j), 0.0))
            sums += (1 if i == j else 2) * np.array(found)
            if i == j or show_pairs:
                pair = _pair(square, *found)
                for row, col in {(i, j), (j, i)}:
                    out += [(names[row], names[col], name, value) for name, value in self._measured(pair)]
        whole = _pair(self.total, *sums.tolist())
        whole.cost = cost
        if self.largest > 0:
            try:
                whole.spectral = self._spectral(approximation), self.largest
            except RuntimeError as error:  # Lanczos has not converged
                self.notes.append(f"relative_spectral of {label} is left out: {error}")
        whole.step = self._step(label, approximation)
        return [(WHOLE, WHOLE, name, value) for name, value in self._measured(whole)] + out

    def _measured(self, pair: Pair) -> list[tuple[str, float]]:
        return list(measured(pair, self.question.wanted - needing("matrix", "damping")).items())

    def _is_known(self, place: tuple[int, int], operator: Operator) -> bool:
        """Whether a block's sums need no gradients: zero, the exact block itself, or compared entry by entry."""
        i, j = place
        small = self.space.sizes[i] * self.space.sizes[j] <= GRADIENT_ENTRIES
        exactly = isinstance(operator, ExampleSpace) and operator.shift == 0
        return isinstance(operator, Zero) or exactly or (isinstance(operator, Dense) and small)

    def _sums(self, place: tuple[int, int], operator: Operator, inner: float) -> tuple[float, float, float]:
        """‖F_ij - M‖², ⟨F_ij, M⟩ and ‖M‖²."""
        square = self.square[place]
        if isinstance(operator, Zero):
            return square, 0.0, 0.0
        if not self._is_known(place, operator):
            own = operator.norm("fro") ** 2
            return max(0.0, square - 2 * inner + own), inner, own
        if not isinstance(operator, Dense):
            return 0.0, square, square
        exact, other = self.fisher.unit_block(*place).double(), operator.M.double()
        gap = float((exact - other).square().sum())
        return gap, float((exact * other).sum()), float(other.square().sum())

    def _spectral(self, approximation: Approximation) -> float:
        probe = self.fisher.probe
        top = extreme_eigenvalues(
            lambda x: self.fisher @ x - approximation @ x, self.space.size,
            which="magnitude", dtype=probe.precision, device=probe.device, tol=1e-4,
        )  # fmt: skip
        return abs(float(top[0]))

    def _step(self, label: str, approximation: Approximation) -> Step | None:
        gradient, strength = self.question.gradient, self.question.strength
        if self.step is None or gradient is None:
            return None
        try:
            step = approximation.solve(gradient, self.question.rule)
        except FAILURES as error:
            self.notes.append(f"directions of {label} are left out: {error}")
            return None
        product, exact, step = (self.fisher @ step).double(), self.step.double(), step.double()
        curvature = float(step @ product) + strength * float(step @ step)
        return Step(gradient.double(), exact, step, curvature)


def _pair(square: float, error: float, inner: float, own: float) -> Pair:
    """A pair from squared norms."""
    return Pair(square**0.5, error**0.5, inner, own**0.5)
