"""Exact samples of the Laplace posterior without its covariance (Benzing 2021, appendix A.1).

The posterior precision is Λ₀ + Σₙ Fₙ, whatever the Fisher's reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor

from fisherviz.exact.passes import Passes
from fisherviz.exact.planning import DOUBLE
from fisherviz.operators.factorise import DampedCholesky, SingularMatrixError
from fisherviz.operators.finite import square_sum
from fisherviz.statistics.examples import ACCURATE, Examples
from fisherviz.support.generators import private
from fisherviz.support.memory import require_samples


class Posterior:
    """N(θ, (Λ₀ + Σₙ Fₙ)⁻¹) for a diagonal prior precision Λ₀.

    Args:
        fisher: the data's side of the Fisher.
        prior_precision: a positive number or a flat torch-order vector (P,) of them.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive.
    """

    def __init__(self, fisher: Passes, prior_precision: float | Tensor) -> None:
        size = fisher.space.size
        complex_ = isinstance(prior_precision, Tensor) and prior_precision.is_complex()
        if complex_ or not isinstance(prior_precision, Real | Tensor):
            what = "a complex tensor" if complex_ else type(prior_precision).__name__
            raise TypeError(f"prior_precision must be a real number or a tensor of them, got {what}.")
        prior = torch.as_tensor(prior_precision, dtype=torch.float64, device=fisher.network.device)
        if prior.dim() > 1 or (prior.dim() == 1 and len(prior) != size):
            raise ValueError(
                f"prior_precision must be a number or a vector of {size} entries, got shape {tuple(prior.shape)}."
            )
        if not bool(((prior > 0) & torch.isfinite(prior)).all()):
            raise ValueError("prior_precision must be positive and finite.")
        self.fisher, self.precision = fisher, prior.expand(size)

    def around_weights(self, deviation: Tensor) -> Tensor:
        """Samples (n, P) of the parameters from deviations (P, n)."""
        weights = torch.cat([p.detach().reshape(-1) for p in self.fisher.network.parameters.values()])
        return weights + deviation.T.to(self.fisher.network.precision)

    def deviations(self, matrix: Callable[[], Tensor], n: int, generator: torch.Generator | None) -> Tensor:
        """N of them in columns, (P, n), dense or in example space.

        Args:
            matrix: gives the Fisher, dense, to write into.
            n: how many.
            generator: their source; None: a private one.
        """
        fisher, device = self.fisher, self.fisher.network.device
        generator, size = private(generator, device), fisher.space.size
        with fisher.processes.agreeing("the memory for samples"):
            require_samples(size, n, device, 3 * DOUBLE * min(size, fisher.columns) ** 2)

        def noise(rows: int) -> Tensor:
            return torch.randn(rows, n, generator=generator, dtype=torch.float64, device=device)

        if size > fisher.columns:
            return self.in_example_space(noise(size), noise(fisher.columns))
        summed = matrix().double().mul_(1.0 if fisher.reduction == "sum" else fisher.examples)
        return self.dense(summed, noise(size))

    def dense(self, matrix: Tensor, noise: Tensor) -> Tensor:
        """Deviations (P, n) from the Fisher summed over the data, dense in float64, and noise (P, n)."""
        matrix.diagonal().add_(self.precision)
        with _of_prior():
            factor = DampedCholesky(matrix, 0.0, "the posterior precision").factor
        return torch.linalg.solve_triangular(factor.mT, noise, upper=True)

    def in_example_space(self, y: Tensor, z: Tensor) -> Tensor:
        """Deviations Λ₀^{-1/2} (y - V M⁻¹ (Vᵀ y + z)) with V = Λ₀^{-1/2} U over all examples and M = I + VᵀV.

        Args:
            y: noise (P, n).
            z: noise (K N, n).
        """
        examples, split, join = self.fisher.in_example_space(), self.fisher.space.split, self.fisher.space.join
        weight = self.precision.rsqrt().unsqueeze(1)
        if examples.dtype != torch.float64:
            beside = square_sum(examples.make_gram()) ** 0.5 / float(self.precision.min())
            if beside > ACCURATE:  # then float32's rounding of VᵀV would drown what is added
                examples = examples.double()
        inner = self._inner(examples)
        right = examples.project(split((weight * y).to(examples.dtype))).double() + z
        with _of_prior():
            factor = DampedCholesky(inner, 1.0, "the posterior in example space", float(self.precision.max()))
        solved = factor.solve(right)
        return weight * y - weight**2 * join(examples.combine(solved.to(examples.dtype))).double()

    def _inner(self, examples: Examples) -> Tensor:
        """VᵀV, in float64."""
        covariance = self.precision.reciprocal()
        if bool((covariance == covariance[0]).all()):
            return examples.make_gram().double() * covariance[0]
        weights = self.fisher.space.split(covariance.to(examples.dtype).unsqueeze(1))
        eye = torch.eye(examples.columns, dtype=examples.dtype, device=covariance.device)
        strips = []
        for strip in eye.split(256, 1):
            columns = [w * u for w, u in zip(weights, examples.combine(strip), strict=True)]
            strips.append(examples.project(columns))
        return torch.cat(strips, 1).double()


@contextmanager
def _of_prior() -> Iterator[None]:
    """Say what would do as the prior's."""
    try:
        yield
    except SingularMatrixError as error:
        what = error.what, error.size, error.smallest, error.damping, error.why
        raise SingularMatrixError(*what, remedy="take a prior_precision") from error
