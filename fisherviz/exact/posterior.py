"""Exact samples of the Laplace posterior without its covariance (Benzing 2021, appendix A.1).

The posterior precision is Λ₀ + Σₙ Fₙ, whatever the Fisher's reduction.
"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


def sample_posterior(
    fisher: Fisher, prior_precision: float | Tensor, n: int, generator: torch.Generator | None
) -> Tensor:
    """Samples (n, P) of N(θ, (Λ₀ + Σₙ Fₙ)⁻¹), flat in torch order; see `Fisher.sample`."""
    space, probe = fisher.space, fisher.probe
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a positive whole number of samples, got {n!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    if not isinstance(prior_precision, Real | Tensor):
        raise TypeError(f"prior_precision must be a number or a tensor, got {type(prior_precision).__name__}.")
    prior = torch.as_tensor(prior_precision, dtype=torch.float64, device=probe.device)
    if prior.dim() > 1 or (prior.dim() == 1 and len(prior) != space.size):
        raise ValueError(
            f"prior_precision must be a number or a vector of {space.size} entries, got shape {tuple(prior.shape)}."
        )
    if not bool(((prior > 0) & torch.isfinite(prior)).all()):
        raise ValueError("prior_precision must be positive and finite.")
    precision = prior.expand(space.size)
    if generator is None:
        generator = torch.Generator(device=probe.device).manual_seed(torch.initial_seed())

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, n, generator=generator, dtype=torch.float64, device=probe.device)

    if space.size <= fisher.columns:
        posterior = fisher.to_dense().double() * (1.0 if fisher.reduction == "sum" else fisher.examples)
        posterior.diagonal().add_(precision)
        factor = torch.linalg.cholesky(posterior)
        deviation = torch.linalg.solve_triangular(factor.mT, noise(space.size), upper=True)
    else:
        deviation = _example_space_deviation(fisher, precision.rsqrt(), noise)
    parameters = torch.cat([p.detach().reshape(-1) for layer in space.layers for p in layer.parameters.values()])
    return parameters + deviation.T.to(probe.precision)


def _example_space_deviation(fisher: Fisher, root: Tensor, noise: object) -> Tensor:
    """Λ₀^{-1/2} (y - V M⁻¹ (Vᵀ y + z)) with V = Λ₀^{-1/2} U over all examples and M = I + VᵀV."""
    assert callable(noise)
    dtype = fisher.probe.precision
    if bool((root == root[0]).all()):
        inner = fisher.example_gram().double() * root[0] ** 2
    else:
        weighted = (root**2).to(dtype)
        eye = torch.eye(fisher.columns, dtype=dtype, device=root.device)
        inner = torch.cat(
            [fisher.rows(weighted.unsqueeze(1) * fisher.columns_product(strip)) for strip in eye.split(256, 1)],
            1,
        ).double()
    inner.diagonal().add_(1.0)
    y, z = noise(fisher.space.size), noise(fisher.columns)
    weight = root.unsqueeze(1)
    right = fisher.rows((weight * y).to(dtype)).double() + z
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(inner))
    return weight * y - weight**2 * fisher.columns_product(solved.to(dtype)).double()
