"""The nearest Kronecker products: the best rank-r Σ A_k ⊗ G_k of each exact block in Frobenius norm.

Van Loan & Pitsianis: the truncated SVD of the rearranged block R. Its products Rᵀ and R are Σ ∇ X ∇ᵀ and Σ ∇ᵀ Y ∇ over
per-example gradients, so that block power iteration never forms the block. Rank 1 is the floor under KFAC's error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.approximations.base import Approximation, Values
from fisherviz.approximations.kronecker import per_group
from fisherviz.captures import AnyCapture, Capture
from fisherviz.layers import Layer
from fisherviz.operators import DirectSum, Kronecker, KroneckerSum, Operator
from fisherviz.products import GRADIENT_ENTRIES
from fisherviz.statistics import Statistic

_ITERATIONS = 500


class NearestKronecker(Approximation):
    """The best sum of `rank` Kronecker products for each exact block, in Frobenius norm.

    Args:
        rank: number of products; 1 is positive semidefinite, more are often indefinite.
        tolerance: relative change of the captured singular values at which iteration stops; None: from the dtype.

    Layers of the generic path are refused: they have no rearrangement.
    """

    plot_order = "input"

    def __init__(self, rank: int = 1, tolerance: float | None = None) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a positive whole number, got {rank!r}.")
        self.rank = rank
        self.tolerance = tolerance

    def wants_capture(self, layer: Layer) -> bool:
        """Always: R is known by products with it."""
        return True

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """None beside the capture."""
        return {}

    def needs(self, layer: Layer) -> dict[str, Statistic]:
        """None; layers without structure are refused."""
        if not layer.structured:
            raise NotImplementedError(
                f"nearest-kronecker refuses layer {layer.name!r}: {layer.note}; probe the other layers with layers=."
            )
        return {}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """Σ_k A_k ⊗ G_k."""
        capture: AnyCapture = values["capture"]
        if not isinstance(capture, Capture):
            raise NotImplementedError(f"nearest-kronecker refuses layer {layer.name!r}: it has no inputs and outputs.")
        if capture.grouped:
            parts = [Capture(capture.a[:, :, h], capture.g[:, :, :, h]) for h in range(layer.groups)]
            return DirectSum([self._nearest(part) for part in parts])
        return self._nearest(capture)

    def _nearest(self, capture: Capture) -> Operator:
        A, G = nearest_factors(capture, self.rank, self.tolerance)
        if self.rank == 1:
            return per_group(Kronecker, A[0], G[0])
        return KroneckerSum(list(zip(A, G, strict=True)))


def nearest_factors(capture: Capture, rank: int, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Leading singular triples of R as factors A (r, da, da) and G (r, dg, dg) of the mean block.

    Raises:
        RuntimeError: block power iteration has not converged.
    """
    work = torch.promote_types(capture.a.dtype, torch.float32)
    capture = Capture(capture.a.to(work), capture.g.to(work))
    da, dg = capture.a.shape[-1], capture.g.shape[-1]
    # for one position R maps everything to symmetric matrices; with weight sharing it has antisymmetric pairs too
    symmetric = capture.factored
    most = min(da * (da + 1) // 2, dg * (dg + 1) // 2) if symmetric else min(da * da, dg * dg)
    rank = min(rank, most)
    width = min(rank + 4, most)
    dtype, device = capture.a.dtype, capture.a.device
    tolerance = 50 * torch.finfo(dtype).eps if tolerance is None else tolerance
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, dg, dg, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
    start[0] = torch.eye(dg, dtype=dtype, device=device)  # KFAC's own direction: A = R vec(I)
    Y = _orthonormal((start + start.mT if symmetric else start).flatten(1))
    captured = 0.0
    for _ in range(_ITERATIONS):
        X = _orthonormal(to_inputs(capture, Y.reshape(width, dg, dg)).flatten(1))
        image = to_outputs(capture, X.reshape(width, da, da)).flatten(1)  # rows: Rᵀ x
        Y = _orthonormal(image)
        energy = float(torch.linalg.svdvals(image.double())[:rank].square().sum())
        if abs(energy - captured) <= tolerance * energy:
            break
        captured = energy
    else:
        raise RuntimeError(
            f"the nearest Kronecker product (rank {rank}) did not converge in {_ITERATIONS} iterations; "
            "raise tolerance= or lower rank=."
        )
    # Rayleigh-Ritz on the converged inputs' subspace: image = Xᵀ R
    U, s, Vh = torch.linalg.svd(image.double(), full_matrices=False)
    left = (U.T.to(dtype) @ X)[:rank].reshape(rank, da, da)
    right = Vh[:rank].to(dtype).reshape(rank, dg, dg)
    if symmetric:
        left, right = (left + left.mT) / 2, (right + right.mT) / 2
    sign = torch.sign(torch.einsum("kii->k", right))
    sign = torch.where(sign == 0, torch.ones_like(sign), sign).reshape(-1, 1, 1)
    root = s[:rank].sqrt().to(dtype).reshape(-1, 1, 1)
    return left * sign * root, right * sign * root


def to_inputs(capture: Capture, Y: Tensor) -> Tensor:
    """1/N Σ_nk ∇ᵀ Y ∇ for each Y (r, dg, dg): (r, da, da)."""
    n = capture.examples
    if capture.factored:
        a, g = capture.a[:, 0], capture.g[:, :, 0]
        weights = torch.stack([((g @ y) * g).sum((0, 2)) for y in Y])
        return torch.stack([(a * w.unsqueeze(1)).T @ a for w in weights]) / n
    return _through_gradients(capture, Y, transpose=True) / n


def to_outputs(capture: Capture, X: Tensor) -> Tensor:
    """1/N Σ_nk ∇ X ∇ᵀ for each X (r, da, da): (r, dg, dg)."""
    n = capture.examples
    if capture.factored:
        a, g = capture.a[:, 0], capture.g[:, :, 0]
        weights = torch.stack([((a @ x) * a).sum(1) for x in X])
        return torch.stack([(g * w.unsqueeze(1)).flatten(0, 1).T @ g.flatten(0, 1) for w in weights]) / n
    return _through_gradients(capture, X, transpose=False) / n


def _through_gradients(capture: Capture, matrices: Tensor, transpose: bool) -> Tensor:
    da, dg = capture.a.shape[-1], capture.g.shape[-1]
    size = da if transpose else dg
    total = matrices.new_zeros(len(matrices), size, size)
    step = max(1, GRADIENT_ENTRIES // (capture.vectors * capture.size))
    for start in range(0, capture.examples, step):
        nabla = capture.select(start, start + step).gradients.reshape(-1, dg, da)
        nabla = nabla.mT if transpose else nabla
        flat = nabla.transpose(0, 1).flatten(1)  # (size, R * inner)
        for i, matrix in enumerate(matrices):
            total[i] += (nabla @ matrix).transpose(0, 1).flatten(1) @ flat.T
    return total


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.double().T)[0].T.to(rows.dtype)
