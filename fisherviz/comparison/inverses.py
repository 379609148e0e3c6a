"""The damped inverse's error and the divergence of the posteriors without a dense matrix, exact or with standard error.

A = (F + λI)⁻¹ beside B, the inverse of the damped approximation. With few gradients everything comes from F's
eigenvectors; otherwise from probes, whose images under A all approximations share. Sums run in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisherviz.comparison.damped import DampedFisher
from fisherviz.comparison.measures import Estimate
from fisherviz.matrices.layered import LayeredMatrix
from fisherviz.operators import (
    Dense,
    Diagonal,
    DiagonalKronecker,
    DirectSum,
    Identity,
    Kronecker,
    KroneckerEigen,
    Operator,
    UnitBlocks,
)
from fisherviz.operators.factorise import eigh
from fisherviz.operators.lanczos import log_quadratures
from fisherviz.statistics.products import GRADIENT_ENTRIES
from fisherviz.support.memory import at_once, require

SEED = 0
"""Of the probes' private generator."""
_CLOSED = (Dense, Diagonal, DiagonalKronecker, Identity, Kronecker, KroneckerEigen, UnitBlocks)
"""Operators whose inverse has a structure of its own."""
_OF_F = {"inverse_frobenius": ("images",), "kl": ("samples", "_log_determinant")}
"""What of `Probes` a metric reads that concerns F alone."""


class Inverses:
    """The metrics of damped inverses by the cheapest way that is exact, else by probes.

    Args:
        damped: F + λI.
        names: of the metrics, "inverse_frobenius" and "kl" or one of them.
        probes: how many random vectors.
        eigenvectors: up to so many gradients F's eigenvectors are taken instead.
    """

    def __init__(self, damped: DampedFisher, names: Sequence[str], probes: int, eigenvectors: int) -> None:
        self.probes = Probes(damped, probes)
        self.exact = Eigenvectors(damped) if damped.fisher.columns <= eigenvectors else None
        known: dict[str, Callable[[LayeredMatrix], Estimate]] = {"inverse_frobenius": self._error, "kl": self._kl}
        self.measures = {name: known[name] for name in names}
        """By metric, of F̂ with its damping."""
        if self.exact is None:  # what concerns F alone is made now: its failure is no approximation's
            self.probes.prepare(names)

    def _error(self, own: LayeredMatrix) -> Estimate:
        found = None if self.exact is None else self.exact.inverse_error(own)
        return self.probes.inverse_error(own) if found is None else found

    def _kl(self, own: LayeredMatrix) -> Estimate:
        if self.exact is not None:
            with contextlib.suppress(NotImplementedError):  # no determinant
                return self.exact.divergence(own)
        return self.probes.divergence(own)

    @property
    def note(self) -> str:
        """How the numbers are made."""
        damped, names = self.probes.damped, ", ".join(self.measures)
        probes = f"{self.probes.count} random probes of seed {self.probes.seed}"
        solver = "" if damped.direct else f"; F is solved by conjugate gradients with a residual of {damped.tol:.0e}"
        if self.exact is not None:
            return f"{names}: exact, by the eigenvectors of F; what has a standard error comes from {probes}."
        return f"{names}: estimates from {probes}, with their standard errors{solver}."


class Eigenvectors:
    """A from the eigenvectors of F, one per gradient: exact, with a product or solve per eigenvector.

    Args:
        damped: F + λI.
    """

    def __init__(self, damped: DampedFisher) -> None:
        self.damped, self.space = damped, damped.fisher.space
        self.examples = damped.fisher.in_example_space().double()
        squares, vectors = eigh(self.examples.make_gram(), "the Gram matrix")
        kept = squares > torch.finfo(squares.dtype).eps * len(squares) * squares.max()
        self.values, self._vectors = squares[kept] * self.examples.scale, vectors[:, kept] / squares[kept].sqrt()
        self.gaps = 1 / (self.values + damped.strength) - 1 / damped.strength
        """What A has along the eigenvectors beyond I/λ."""

    def _forms(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """qᵀ f(q) of each eigenvector q."""
        found = []
        for w in self._vectors.split(max(1, at_once(GRADIENT_ENTRIES, self._vectors) // (4 * self.space.size)), 1):
            q = self.space.join(self.examples.combine(w))
            found.append((q * function(q).double()).sum(0))
        return torch.cat(found)

    def inverse_error(self, own: LayeredMatrix) -> Estimate | None:
        """‖A - B‖ / ‖A‖ with A = I/λ + Σ gap q qᵀ; None where B has no structure.

        Args:
            own: F̂ with its damping.
        """
        if not _closed(own.whole):
            return None
        strength, size = self.damped.strength, self.space.size
        rest = own.whole.inverse().scale(-1.0).shifted(1 / strength)  # I/λ - B
        forms = self._forms(lambda q: q / strength - own.solve(q).double())
        square = rest.norm("fro") ** 2 + float((self.gaps * (2 * forms + self.gaps)).sum())
        exact = (size - len(self.gaps)) / strength**2 + float((self.values + strength).pow(-2).sum())
        return Estimate(math.sqrt(max(0.0, square) / exact))

    def divergence(self, own: LayeredMatrix) -> Estimate:
        """KL(N(0, A) ‖ N(0, B)); see `Probes.divergence`."""
        strength, size, theirs = self.damped.strength, self.space.size, own.whole.log_determinant()
        trace = own.norm("trace") / strength + float((self.gaps * self._forms(own.__matmul__)).sum())
        exact = size * math.log(strength) + float((self.values / strength).log1p().sum())
        return Estimate(max(0.0, 0.5 * (trace - size + exact - theirs)))


class Probes:
    """A known by its images of random vectors.

    Args:
        damped: F + λI.
        count: how many vectors.
        seed: of their generator, which is drawn from on the CPU: every device and precision starts from the same.
    """

    def __init__(self, damped: DampedFisher, count: int, seed: int = SEED) -> None:
        self.damped, self.count, self.seed = damped, count, seed
        self._size, self._precision = damped.fisher.shape[0], damped.fisher.network.precision

    def prepare(self, names: Sequence[str]) -> None:
        """Solve what concerns F alone.

        Raises:
            MemoryError: the vectors do not fit.
        """
        size = 4 * self._size * self.count * torch.empty((), dtype=self._precision, device="cpu").element_size()
        device = self.damped.fisher.network.device
        require(size, device, f"{self.count} probes of {self._size:,} parameters", "leave out their metrics")
        for attribute in (attribute for name in names for attribute in _OF_F[name]):
            getattr(self, attribute)

    def _split(self, vectors: Tensor) -> Iterator[Tensor]:
        yield from vectors.split(max(1, at_once(GRADIENT_ENTRIES, vectors) // (4 * self._size)), 1)

    def _normal(self, rows: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(rows, self.count, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(device=self.damped.fisher.network.device, dtype=self._precision)

    @cached_property
    def signs(self) -> Tensor:
        """Random signs, (P, m)."""
        return self._normal(self._size, torch.Generator().manual_seed(2 * self.seed)).sign()

    @cached_property
    def images(self) -> Tensor:
        """A times the signs, (P, m)."""
        return torch.cat([self.damped.solve(part) for part in self._split(self.signs)], 1)

    @cached_property
    def samples(self) -> tuple[Tensor, Tensor]:
        """Samples x of N(0, A) and (F + λI) x, each (P, m): the latter is √λ y + √s U w for normal y and w."""
        generator, fisher = torch.Generator().manual_seed(2 * self.seed + 1), self.damped.fisher
        examples = fisher.in_example_space()
        sources = self._normal(self._size, generator).mul_(self.damped.strength**0.5)
        drawn = self._normal(examples.columns, generator).mul_(examples.scale**0.5)
        sources += torch.cat([fisher.space.join(examples.combine(part)) for part in self._split(drawn)], 1)
        found = torch.cat([self.damped.solve(part) for part in self._split(sources)], 1)
        return found, sources if self.damped.direct else self.damped @ found  # without what a residual leaves

    def inverse_error(self, own: LayeredMatrix) -> Estimate:
        """‖A - B‖ / ‖A‖ by Hutchinson's estimator of both squares, E ‖(A - B) z‖² for random signs z.

        The standard error of the ratio is that of its linear part (delta method).

        Args:
            own: F̂ with its damping.
        """
        squares = torch.cat(
            [
                (image - own.solve(z)).double().square().sum(0)
                for z, image in zip(self._split(self.signs), self._split(self.images), strict=True)
            ]
        )
        exact = torch.cat([image.double().square().sum(0) for image in self._split(self.images)])
        ratio = float(squares.sum() / exact.sum())
        error = _mean(squares - ratio * exact).error / float(exact.mean())
        return Estimate(ratio**0.5, error / (2 * ratio**0.5) if ratio > 0 else 0.0)

    def divergence(self, own: LayeredMatrix) -> Estimate:
        """KL(N(0, A) ‖ N(0, B)) = (tr B⁻¹A - P + log det(F + λI) - log det B⁻¹) / 2.

        tr B⁻¹A - P is the mean of xᵀ (B⁻¹ - F - λI) x over samples x of N(0, A): the closer F̂, the smaller its
        variance. What has no determinant takes a stochastic Lanczos quadrature.

        Args:
            own: F̂ with its damping.
        """
        forms = torch.cat(
            [
                (x * (own @ x - source)).double().sum(0)
                for x, source in zip(*map(self._split, self.samples), strict=True)
            ]
        )
        try:
            theirs: float | Tensor = own.whole.log_determinant()
        except NotImplementedError:
            theirs = self._logarithms(own.__matmul__)
        found = _mean(0.5 * (forms + self._log_determinant - theirs))
        return Estimate(max(0.0, found.value), found.error)

    @cached_property
    def _log_determinant(self) -> float | Tensor:
        if self.damped.direct:
            return self.damped.fisher.log_determinant(self.damped.strength)
        return self._logarithms(self.damped.__matmul__)

    def _logarithms(self, matvec: Callable[[Tensor], Tensor]) -> Tensor:
        """zᵀ log(M) z of each vector of signs z, (m,)."""
        return torch.cat([log_quadratures(matvec, part) for part in self._split(self.signs)])


def _mean(samples: Tensor) -> Estimate:
    """The mean of independent samples (m,)."""
    return Estimate(float(samples.mean()), float(samples.std()) / len(samples) ** 0.5)


def _closed(operator: Operator) -> bool:
    """Whether the inverse has a structure, so that its norm is known."""
    return all(map(_closed, operator.operators)) if isinstance(operator, DirectSum) else isinstance(operator, _CLOSED)
