"""Comparison of matrices too large to be dense: by sums in example space, products and solves alone.

‖F - F̂‖² = ‖F‖² - 2⟨F, F̂⟩ + ‖F̂‖², each term exact and accumulated in float64; spectral errors by Lanczos, damped
inverses and divergences by `inverses`. Nuclear and max norms are left out and the notes say so, as whatever would take
more than its budget and was not asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherviz.approximations import FAILURES, Approximation
from fisherviz.comparison.budget import Budget
from fisherviz.comparison.damped import DampedFisher
from fisherviz.comparison.inner import inner_with_exact
from fisherviz.comparison.inverses import Inverses
from fisherviz.comparison.measures import Cost, Pair, Question, Step, measured
from fisherviz.comparison.sample import Sample
from fisherviz.exact.planning import sizes_of
from fisherviz.exact.spectra import square_norms
from fisherviz.matrices.example_operator import ExampleSpace
from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.operators import Dense, Operator, Zero, extreme_eigenvalues
from fisherviz.results.comparison import EXACT, WHOLE, row_label
from fisherviz.results.metrics import needing
from fisherviz.statistics.products import GRADIENT_ENTRIES
from fisherviz.support.errors import sentence as told
from fisherviz.support.memory import at_once

Row = tuple[str, str, str, float, float]
_MAX_PAIRS = 100
_SPECTRAL_TOLERANCE = 1e-4


class StructuredComparison:
    """Measures approximations of one Fisher without dense matrices."""

    def __init__(self, question: Question) -> None:
        self.question, self.fisher, self.space = question, question.fisher, question.fisher.space
        fisher, wanted = question.fisher, question.wanted
        self.notes: list[str] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.inner: dict[str, dict[tuple[int, int], float] | Exception] = {}
        self.square = square_norms(fisher)
        self.by_column = sorted(self.square, key=lambda place: place[::-1])  # as chains make their blocks
        self.total = sum((1 if i == j else 2) * value for (i, j), value in self.square.items())
        self.arrays[f"block_rms/{EXACT}"] = self._root_means(self.square)
        self.sample = self._sample()
        if left_out := sorted(wanted & needing("matrix")):
            self.notes.append(
                f"{', '.join(left_out)} are left out, like heatmaps and spectra: they need dense {self.space.size:,} x "
                f"{self.space.size:,} matrices, {question.why_not_dense}."
            )
        self.budget, self.sizes = Budget(wanted, question.explicit), sizes_of(fisher)
        self.damped = DampedFisher(fisher, question.strength, products=self.budget.iterations(self.sizes))
        self.largest = self._largest() if "relative_spectral" in wanted else 0.0
        self.step = self._exact_step() if wanted & needing("direction") else None
        self.inverses = self._inverses(sorted(wanted & needing("damping")))
        fisher.release_solver()  # approximations factorise matrices of its size
        n = len(self.space.layers)
        directions = set() if question.gradient is None else needing("direction")
        if n > 1 and (alone := sorted(wanted & (needing("damping") | directions | {"relative_spectral"}))):
            self.notes.append(
                f"of single layers {', '.join(alone)} {'is' if len(alone) == 1 else 'are'} left out: that needs dense "
                "blocks; probe one layer at a time with layers=."
            )
        if n**2 > _MAX_PAIRS:
            self.notes.append(f"blocks between layers have no rows of their own: {n * (n - 1):,} of them.")
        floor = (64 * torch.finfo(fisher.probe.precision).eps) ** 0.5
        self.notes.append(
            f"relative_frobenius comes from a difference of squares: below {floor:.1g} it means nothing but 'small'."
        )

    def _costly(self, names: str, why: str) -> None:
        self.notes.append(f"{names} left out for {self.space.size:,} parameters: {why}; ask for it with metrics=.")

    def _sample(self) -> Sample | None:
        """Parameters whose entries are shown one by one, where these fit in every process."""
        sample = Sample(self.fisher)
        why_not = max(self.fisher.processes.exchange(sample.why_not()), key=len)
        if why_not:
            self.notes.append(f"a sample of single entries is left out: {why_not}.")
            return None
        self.arrays |= sample.exact_arrays()
        return sample

    def _largest(self) -> float:
        """‖F‖₂, where it and the differences' norms are affordable."""
        if not self.budget.lanczos(self.sizes):
            self._costly("relative_spectral is", "Lanczos takes more products with F than the budget has")
            return 0.0
        try:
            largest = self._spectral(self.fisher.__matmul__)
        except RuntimeError as error:  # Lanczos has not converged
            self.notes.append(f"relative_spectral is left out: {error}")
            return 0.0
        self.notes.append(
            f"relative_spectral comes from Lanczos with a residual of {_SPECTRAL_TOLERANCE:.0e} of the eigenvalue."
        )
        return largest

    def _exact_step(self) -> Tensor | None:
        """(F + λI)⁻¹ ∇h."""
        gradient, damped = self.question.gradient, self.damped
        if gradient is None:
            return None
        try:
            if damped.direct:
                return self.fisher.solve(gradient, damped.strength)
            step = damped.solve(gradient)
        except MemoryError as error:
            self.notes.append(f"directions are left out: {error}")
            return None
        except RuntimeError as error:  # conjugate gradients have not converged
            asked = "" if self.question.explicit else " Ask for them with metrics=, or use fewer examples."
            self.notes.append(f"directions are left out: {error}{asked}")
            return None
        self.notes.append(
            "directions: the exact natural gradient comes from conjugate gradients, with a residual of "
            f"{damped.tol:.0e} of the gradient."
        )
        return step

    def _inverses(self, names: list[str]) -> Inverses | None:
        """What damped inverses and divergences come from, ready; None where they are not affordable."""
        if not names:
            return None
        said = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
        budget, damped = self.budget, self.damped
        if damped.strength <= 0:
            self.notes.append(f"{said} left out: without damping the Fisher has no inverse; give damping=.")
            return None
        if why_not := budget.why_no_probes(self.sizes):
            self._costly(said, why_not)
            return None
        try:
            found = Inverses(damped, names, budget.probes(self.sizes), budget.eigenvectors)
        except FAILURES as error:
            self.notes.append(f"{said} left out: {error}")
            return None
        self.notes.append(found.note)
        return found

    def prepare(self, fitted: Mapping[str, Approximation]) -> None:
        """One sweep over the gradients for all matrices; what ends one of them is raised when its rows are wanted."""
        blocks: dict[str, dict[tuple[int, int], Operator]] = {}
        for label, approximation in fitted.items():
            try:
                found = {place: approximation.operator(*place) for place in self.by_column}
            except FAILURES as error:
                self.inner[label] = error
            else:
                blocks[label] = {place: own for place, own in found.items() if not self._is_known(place, own)}
        self.inner |= inner_with_exact(self.fisher, blocks)

    def rows(self, label: str, approximation: Approximation, cost: Cost) -> list[Row]:
        """All rows (row, col, metric, value, standard error) of a fitted approximation."""
        names = [row_label(name) for name in self.space.names]
        show_pairs = len(self.space.layers) ** 2 <= _MAX_PAIRS
        out: list[Row] = []
        sums = np.zeros(3)
        squares: dict[str, dict[tuple[int, int], float]] = {"block_rms": {}, "block_rms_difference": {}}
        if isinstance(inner := self.inner[label], Exception):
            raise inner
        compared = {
            place: self._sums(place, approximation.operator(*place), inner.get(place, 0.0)) for place in self.by_column
        }
        for (i, j), square in self.square.items():
            found = compared[i, j]
            sums += (1 if i == j else 2) * np.array(found)
            squares["block_rms_difference"][i, j], _, squares["block_rms"][i, j] = found
            if i == j or show_pairs:
                pair = _pair(square, *found)
                for row, col in {(i, j), (j, i)}:
                    out += [(names[row], names[col], *each) for each in self._measured(pair)]
        whole = _pair(self.total, *sums.tolist())
        whole.cost = cost
        if self.largest > 0:
            try:
                whole.spectral = self._spectral(lambda x: self.fisher @ x - approximation @ x), self.largest
            except RuntimeError as error:  # Lanczos has not converged
                self.notes.append(f"relative_spectral of {label} is left out: {error}")
        self._measure_damped(label, approximation, whole)
        self.arrays |= {f"{name}/{label}": self._root_means(found) for name, found in squares.items()}
        self._show(label, approximation)
        return [(WHOLE, WHOLE, *each) for each in self._measured(whole)] + out

    def _show(self, label: str, approximation: Approximation) -> None:
        """Its entries of the sample."""
        if self.sample is None:
            return
        try:
            self.arrays |= self.sample.arrays_of(label, approximation)
        except FAILURES as error:
            self.notes.append(f"single entries of {label} are left out: {told(error)}")

    def _measure_damped(self, label: str, approximation: Approximation, whole: Pair) -> None:
        """Directions, the inverse and the divergence, as far as they exist."""
        try:
            own = approximation.damped(self.question.rule)
        except FAILURES as error:
            self.notes.append(f"damped metrics of {label} are left out: {told(error)}")
            return
        wanted: dict[str, Callable[[LayeredMatrix], Any]] = {}
        if self.step is not None:
            wanted["directions"] = self._compared
        if (inverses := self.inverses) is not None:
            if own.whole.direct or self.question.explicit:
                wanted |= inverses.measures
            else:
                self._costly(
                    f"{', '.join(inverses.measures)} of {label} are", "its damped matrix is solved by iterations"
                )
        found: dict[str, Any] = {}
        failed: dict[str, list[str]] = {}
        for name, function in wanted.items():
            try:
                found[name] = function(own)
            except FAILURES as error:
                failed.setdefault(told(error), []).append(name)
        self.notes += [f"{', '.join(names)} of {label} are left out: {why}" for why, names in failed.items()]
        whole.step = found.get("directions")
        whole.inverse_error, whole.divergence = found.get("inverse_frobenius"), found.get("kl")

    def _root_means(self, squares: Mapping[tuple[int, int], float]) -> np.ndarray:
        """The root mean square of each block's entries, (layers, layers), from the sums of their squares."""
        out = np.zeros((len(self.space.layers),) * 2)
        for (i, j), square in squares.items():
            out[i, j] = out[j, i] = (square / (self.space.sizes[i] * self.space.sizes[j])) ** 0.5
        return out

    def _measured(self, pair: Pair) -> list[tuple[str, float, float]]:
        return measured(pair, self.question.wanted - needing("matrix"))

    def _is_known(self, place: tuple[int, int], operator: Operator) -> bool:
        """Whether a block's sums need no gradients: zero, the exact block itself, or compared entry by entry."""
        i, j = place
        small = self.space.sizes[i] * self.space.sizes[j] <= at_once(GRADIENT_ENTRIES, operator.tensors[0])
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

    def _spectral(self, product: Callable[[Tensor], Tensor]) -> float:
        probe = self.fisher.probe
        top = extreme_eigenvalues(
            product, self.space.size, which="magnitude", dtype=probe.precision, device=probe.device,
            tol=_SPECTRAL_TOLERANCE, maxiter=self.budget.lanczos(self.sizes),
        )  # fmt: skip
        return abs(float(top[0]))

    def _compared(self, own: LayeredMatrix) -> Step:
        """The damped approximation's natural gradient beside the exact one."""
        gradient, exact = self.question.gradient, self.step
        assert gradient is not None
        assert exact is not None
        step = own.solve(gradient)
        product, exact, step = (self.fisher @ step).double(), exact.double(), step.double()
        curvature = float(step @ product) + self.question.strength * float(step @ step)
        return Step(gradient.double(), exact, step, curvature)


def _pair(square: float, error: float, inner: float, own: float) -> Pair:
    """A pair from squared norms."""
    return Pair(square**0.5, error**0.5, inner, own**0.5)
