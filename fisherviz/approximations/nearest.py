"""The nearest Kronecker products: the best rank-r Σ A_k ⊗ G_k of each exact block in Frobenius norm.

Van Loan & Pitsianis: the truncated SVD of the rearranged block R. Its products Rᵀ and R are Σ ∇ X ∇ᵀ and Σ ∇ᵀ Y ∇ over
per-example gradients, so that Lanczos, or block power iteration, never forms the block. Rank 1 is the floor under
KFAC's error.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisherviz.approximations.base import Approximation, PerFeature, Values, check_per_feature
from fisherviz.approximations.kronecker import product
from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.capture.formed import FormedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.network.layers import Layer
from fisherviz.operators import DirectSum, KroneckerSum, Operator
from fisherviz.operators.factorise import eigh, symmetric
from fisherviz.operators.lanczos import leading_eigenvector
from fisherviz.statistics import Statistic
from fisherviz.statistics.products import GRADIENT_ENTRIES, working
from fisherviz.support.choices import count, share
from fisherviz.support.memory import at_once

_ITERATIONS = 500
_ROUNDINGS = 50
"""What is below so many roundings of the largest singular value is rounding."""

Known = Capture | FormedCapture | TokenCapture
"""What products with R are made of."""


class NearestKronecker(Approximation):
    """The best sum of `rank` Kronecker products for each exact block, in Frobenius norm.

    Args:
        rank: number of products; 1 is positive semidefinite, more are often indefinite.
        tolerance: relative change of the captured singular values at which iteration stops; None: from the dtype.
        per_feature: as for "kfac".
    """

    takes_factors = True

    def __init__(self, rank: int = 1, tolerance: float | None = None, per_feature: PerFeature = "units") -> None:
        super().__init__()
        self.per_feature = check_per_feature(per_feature)
        self.rank = count("rank", rank)
        if tolerance is not None:
            share("tolerance", tolerance)
        self.tolerance = tolerance

    def wants_capture(self, layer: Layer) -> bool:
        """Always: R is known by products with it."""
        return True

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """None beside the capture."""
        return {}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """Σ_k A_k ⊗ G_k."""
        capture: AnyCapture = values["capture"]
        assert isinstance(capture, Known)
        if layer.groups == 1:
            return self._nearest(capture)
        return DirectSum([self._nearest(_group(capture, h, layer)) for h in range(layer.groups)])

    def _nearest(self, capture: Known) -> Operator:
        A, G = nearest_factors(capture, self.rank, self.tolerance)
        if self.rank == 1:
            return product(A[0], G[0])
        return KroneckerSum(list(zip(A, G, strict=True)))


def _group(capture: Known, h: int, layer: Layer) -> Known:
    """What is shown of one group of a grouped convolution."""
    if isinstance(capture, FormedCapture):
        dg = layer.d_out // layer.groups
        return capture.units(h * dg, (h + 1) * dg)
    assert isinstance(capture, Capture)
    return Capture(capture.a[:, :, h], capture.g[:, :, :, h])


def nearest_factors(capture: Known, rank: int, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    """Leading singular triples of R as factors A (r, da, da) and G (r, dg, dg) of the mean block.

    Of embeddings the nearest with a diagonal A, whose diagonals (r, V) are returned: those of R's rows alone.

    Each pair is symmetric, or (only for rank > 1, with weight sharing) antisymmetric on both sides; a single pair
    is positive semidefinite.

    Raises:
        RuntimeError: the iteration has not converged.
    """
    like = capture.tensors[0]
    capture, unit = _of_size_one(capture.to(working(like)))
    tolerance = 50 * torch.finfo(working(like)).eps if tolerance is None else tolerance
    # R commutes with transposition: its singular vectors are found among the symmetric and among the antisymmetric
    # matrices, also where singular values coincide. It maps semidefinite to semidefinite, hence (Perron) a leading
    # one is symmetric; for a single position everything antisymmetric is mapped to zero.
    if rank == 1:
        A, G = _semidefinite(capture, _first(capture, tolerance))
        return A * unit, G * unit
    found = [_leading(capture, rank, tolerance, 1)]
    if not isinstance(capture, TokenCapture) and not capture.factored:
        found.append(_leading(capture, rank, tolerance, -1, float(found[0][1][0])))
    left, s, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    best = s.argsort(descending=True, stable=True)[:rank]
    left, root, right = left[best], s[best].sqrt().reshape(-1, 1, 1), right[best]
    sign = torch.sign(torch.einsum("kii->k", right))
    sign = torch.where(sign == 0, torch.ones_like(sign), sign).reshape(-1, 1, 1)
    return left * _like(unit * sign * root, left), right * unit * sign * root


def _of_size_one(capture: Known) -> tuple[Known, float]:
    """The same over its largest gradient entries, and these: iterations multiply moments of fourth order."""
    if isinstance(capture, FormedCapture):
        most = float(capture.gradients.abs().max()) or 1.0
        return replace(capture, gradients=capture.gradients / most), most
    most_g = float(capture.g.abs().max()) or 1.0
    if isinstance(capture, TokenCapture):
        return replace(capture, g=capture.g / most_g), most_g
    most_a = float(capture.a.abs().max()) or 1.0
    return replace(capture, a=capture.a / most_a, g=capture.g / most_g), most_a * most_g


def _first(capture: Known, tolerance: float) -> Tensor:
    """The leading right singular vector of R, (1, dg, dg), by Lanczos on the smaller of RᵀR and RRᵀ."""
    da, dg = _sizes(capture)

    def forward(y: Tensor) -> Tensor:
        return _pack(to_inputs(capture, _unpack(y.unsqueeze(0), dg, 1)), 1)[0]

    def backward(x: Tensor) -> Tensor:
        return _pack(to_outputs(capture, _unpack(x.unsqueeze(0), da, 1)), 1)[0]

    like = capture.tensors[0]
    start = _pack(torch.eye(dg, dtype=like.dtype, device=like.device).unsqueeze(0), 1)[0]
    first = forward(start)  # KFAC's own A
    residual = 20 * tolerance  # a thousand roundings of the products
    try:
        if len(first) < len(start):
            y = backward(leading_eigenvector(lambda x: forward(backward(x)), first, residual, _ITERATIONS))
        else:
            y = leading_eigenvector(lambda y: backward(forward(y)), start, residual, _ITERATIONS)
    except RuntimeError as error:
        raise RuntimeError(f"the nearest Kronecker product did not converge; raise tolerance=: {error}") from error
    return _unpack(y.unsqueeze(0), dg, 1)


def _leading(
    capture: Known, rank: int, tolerance: float, parity: int, largest: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """At most `rank` leading singular triples of R among matrices with Mᵀ = parity · M.

    What is within rounding of the `largest` singular value is zero, as all antisymmetric parts are where every
    gradient has rank one, and has no directions to converge to.
    """
    da, dg = _sizes(capture)
    inputs = capture.size // dg if da is None else da * (da + parity) // 2
    most = min(inputs, dg * (dg + parity) // 2)
    width = min(rank + 4, most)
    rank = min(rank, most)
    dtype, device = capture.tensors[0].dtype, capture.tensors[0].device
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, dg, dg, generator=generator, dtype=torch.float64, device="cpu").to(
        device=device, dtype=dtype
    )
    if parity == 1:
        start[0] = torch.eye(dg, dtype=dtype, device=device)  # KFAC's own direction: A = R vec(I)
    if width == 0:
        return start.new_zeros(0, *([inputs] if da is None else [da, da])), start.new_zeros(0), start
    Y = _orthonormal(_pack(start, parity))
    captured, eps = 0.0, torch.finfo(dtype).eps
    for _ in range(_ITERATIONS):
        X = _orthonormal(_pack(to_inputs(capture, _unpack(Y, dg, parity)), parity))
        image = _pack(to_outputs(capture, _unpack(X, da, parity)), parity)  # rows: Rᵀ x
        Y = _orthonormal(image)
        energy = float(torch.linalg.svdvals(image.double())[:rank].square().sum())
        if abs(energy - captured) <= tolerance * energy or energy <= (_ROUNDINGS * eps * largest) ** 2:
            break
        captured = energy
    else:
        raise RuntimeError(
            f"the nearest Kronecker product (rank {rank}) did not converge in {_ITERATIONS} iterations; "
            "raise tolerance= or lower rank=."
        )
    # Rayleigh-Ritz on the converged inputs' subspace: image = Xᵀ R
    U, s, Vh = torch.linalg.svd(image.double(), full_matrices=False)
    left = _unpack((U.T.to(dtype) @ X)[:rank], da, parity)
    return left, s[:rank].to(dtype), _unpack(Vh[:rank].to(dtype), dg, parity)


def _semidefinite(capture: Known, right: Tensor) -> tuple[Tensor, Tensor]:
    """The leading pair with both factors positive semidefinite, from a symmetric right vector (1, dg, dg).

    |Y| (of its eigenvalues) loses nothing against Y, since R keeps semidefinite matrices so; two more half-steps,
    each a best fit given the other factor, then give factors that are semidefinite as they stand.
    """
    values, vectors = eigh(right, "the output factor", torch.float64)
    Y = (vectors * values.abs().unsqueeze(-2) @ vectors.mT).to(right.dtype)
    X = to_inputs(capture, Y)
    X = symmetric(X) if X.dim() == 3 else X
    size = torch.linalg.vector_norm(X, dim=tuple(range(1, X.dim())), keepdim=True)
    X = X / torch.where(size > 0, size, torch.ones_like(size))
    Y = symmetric(to_outputs(capture, X))
    size = torch.linalg.matrix_norm(Y, keepdim=True)
    root = size.sqrt()
    return X * _like(root, X), Y / torch.where(root > 0, root, torch.ones_like(root))


def _sizes(capture: Known) -> tuple[int | None, int]:
    """da, None where A is diagonal, and dg."""
    if isinstance(capture, TokenCapture):
        return None, capture.g.shape[-1]
    return capture.width, capture.size // capture.width


def _like(scales: Tensor, x: Tensor) -> Tensor:
    """One number for each of x (r, ...), in a shape that multiplies it."""
    return scales.reshape(-1, *(1 for _ in x.shape[1:]))


def _weights(diagonal: Tensor, like: Tensor) -> Tensor:
    """√2 off the diagonal, in the very precision."""
    return (2 - diagonal.to(like)).sqrt()


def _pack(matrices: Tensor, parity: int) -> Tensor:
    """Orthonormal coordinates (r, d(d ± 1)/2) of the matrices' (anti)symmetric parts."""
    if matrices.dim() == 2:  # diagonals
        return matrices
    d = matrices.shape[-1]
    i, j = torch.triu_indices(d, d, (1 - parity) // 2, device=matrices.device)
    part = (matrices + parity * matrices.mT) / 2
    return part[:, i, j] * _weights(i == j, matrices)


def _unpack(rows: Tensor, d: int | None, parity: int) -> Tensor:
    """The (anti)symmetric matrices (r, d, d) with these coordinates; None: they are diagonals."""
    if d is None:
        return rows
    i, j = torch.triu_indices(d, d, (1 - parity) // 2, device=rows.device)
    upper = rows.new_zeros(len(rows), d, d)
    upper[:, i, j] = rows / (_weights(i == j, rows) * (1 + (i == j).to(rows)))
    return upper + parity * upper.mT


def to_inputs(capture: Known, Y: Tensor) -> Tensor:
    """1/N Σ_nk ∇ᵀ Y ∇ for each Y (r, dg, dg): (r, da, da), or its diagonal (r, V)."""
    n = capture.examples
    if isinstance(capture, TokenCapture):
        found = capture.sparse
        forms = torch.stack([((found.g @ y) * found.g).sum((0, 2)) for y in Y])
        return forms.new_zeros(len(Y), capture.vocabulary).index_add_(1, found.token, forms) / n
    if isinstance(capture, FormedCapture):
        return _through_gradients(capture, Y, transpose=True) / n
    if capture.factored:
        a, g = capture.a[:, 0], capture.g[:, :, 0]
        weights = torch.stack([((g @ y) * g).sum((0, 2)) for y in Y])
        return torch.stack([(a * w.unsqueeze(1)).T @ a for w in weights]) / n
    if _by_positions(capture):
        a, g = capture.a, capture.g.permute(1, 0, 2, 3)  # (N, K, T, dg)
        return torch.stack([a.flatten(0, 1).T @ ((g @ y @ g.mT).sum(1) @ a).flatten(0, 1) for y in Y]) / n
    return _through_gradients(capture, Y, transpose=True) / n


def to_outputs(capture: Known, X: Tensor) -> Tensor:
    """1/N Σ_nk ∇ X ∇ᵀ for each X (r, da, da), or diagonal X (r, V): (r, dg, dg)."""
    n = capture.examples
    if isinstance(capture, TokenCapture):
        found = capture.sparse
        rows = found.g.flatten(0, 1)
        return torch.stack([(found.g * x[found.token].unsqueeze(1)).flatten(0, 1).T @ rows for x in X]) / n
    if isinstance(capture, FormedCapture):
        return _through_gradients(capture, X, transpose=False) / n
    if capture.factored:
        a, g = capture.a[:, 0], capture.g[:, :, 0]
        weights = torch.stack([((a @ x) * a).sum(1) for x in X])
        return torch.stack([(g * w.unsqueeze(1)).flatten(0, 1).T @ g.flatten(0, 1) for w in weights]) / n
    if _by_positions(capture):
        a, g = capture.a, capture.g
        return torch.stack([g.flatten(0, 2).T @ ((a @ x @ a.mT) @ g).flatten(0, 2) for x in X]) / n
    return _through_gradients(capture, X, transpose=False) / n


def _by_positions(capture: Capture) -> bool:
    """Whether products over pairs of an example's positions cost less than those with its gradient (dg, da)."""
    k, t, da, dg = capture.vectors, capture.positions, capture.a.shape[-1], capture.g.shape[-1]
    return t * (k * (t + dg) * dg + (t + da) * da) < k * da * dg * (da + dg)


def _through_gradients(capture: Capture | FormedCapture, matrices: Tensor, transpose: bool) -> Tensor:
    da, dg = capture.width, capture.size // capture.width
    size = da if transpose else dg
    total = matrices.new_zeros(len(matrices), size, size)
    step = max(1, at_once(GRADIENT_ENTRIES, total) // (capture.vectors * capture.size))
    for start in range(0, capture.examples, step):
        nabla = capture.select(start, start + step).gradients.reshape(-1, dg, da)
        nabla = nabla.mT if transpose else nabla
        flat = nabla.transpose(0, 1).flatten(1)  # (size, R * inner)
        for i, matrix in enumerate(matrices):
            total[i] += (nabla @ matrix).transpose(0, 1).flatten(1) @ flat.T
    return total


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.double().T)[0].T.to(rows.dtype)
