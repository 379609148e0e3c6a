"""Extreme eigenvalues, singular values and solutions from products alone, to a stated tolerance.

Block Lanczos with full reorthogonalisation and thick restarts (Krylov-Schur), and conjugate gradients. Start
vectors come from a private seeded generator; what does not converge raises, nothing is returned half done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fisherviz.operators.factorise import eigenvalues, eigh
from fisherviz.operators.finite import NonFiniteMatrixError
from fisherviz.support.choices import one_of
from fisherviz.support.progress import progress_bar

Product = Callable[[Tensor], Tensor]
Which = Literal["largest", "smallest", "magnitude"]


LARGE = 1e-2
"""Residual, relative to the right-hand side, that a solve does not leave without a word."""
_SINGLE = 40
"""Vectors kept by `leading_eigenvector` before it starts again."""


class NotSolvedError(RuntimeError):
    """Conjugate gradients have not converged, or met a direction of no positive curvature."""


def extreme_eigenvalues(
    matvec: Product,
    size: int,
    k: int = 1,
    *,
    which: Which = "largest",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    tol: float | None = None,
    maxiter: int = 1000,
) -> Tensor:
    """Find the k extreme eigenvalues of a symmetric matrix that is known by its products.

    The block has k columns, so that eigenvalues of multiplicity up to k are all found.

    Args:
        matvec: maps (size, b) to (size, b), symmetric.
        size: rows of the matrix.
        k: how many.
        which: "largest" and "smallest" are algebraic; "magnitude" goes by |eigenvalue| and keeps the sign.
        dtype: precision of the vectors.
        device: where the vectors live.
        tol: residual norm, relative to the largest |eigenvalue|, at which a value counts as found (it bounds
            the value's error); None: 1e-8 in float64, 1e-5 in float32.
        maxiter: products with blocks before giving up.

    Returns:
        (min(k, size),): descending for "largest" and by magnitude, ascending for "smallest".

    Raises:
        RuntimeError: when not converged after `maxiter` products.
        ValueError: for a `which`, k or size that makes no sense, or non-finite products.
    """
    one_of("which", which, ("largest", "smallest", "magnitude"))
    if size < 1 or k < 1:
        raise ValueError(f"size and k must be at least 1, got size={size} and k={k}.")
    k = min(k, size)
    if size <= max(64, 3 * k):
        M = matvec(torch.eye(size, dtype=dtype, device=device))
        return _select(eigenvalues(_finite(M / 2 + M.mT / 2)), which)[0][:k]
    tol = _default_tolerance(dtype) if tol is None else tol
    generator = torch.Generator().manual_seed(0)
    basis = torch.empty(size, 0, dtype=dtype, device=device)
    block, _ = _orthonormal(_normal(size, k, basis, generator), basis, generator)
    first = _finite(matvec(block))
    if not (unit := float(first.abs().max())):
        unit = 1.0  # products may be as large or small as the precision allows, their squares may not
    capacity = min(size, max(4 * k, k + 100))
    projected = basis.new_zeros(0, 0)
    residual = float("inf")
    next_check = 1
    for step in progress_bar(range(1, maxiter + 1), "Lanczos", "product"):
        W = (first if step == 1 else _finite(matvec(block))) / unit
        width = block.shape[1]
        basis = torch.cat([basis, block], 1)
        H = basis.mT @ W
        projected = torch.nn.functional.pad(projected, (0, width, 0, width))
        projected[:, -width:] = H
        projected[-width:, :] = H.mT
        if basis.shape[1] >= size:
            return _select(eigenvalues((projected + projected.mT) / 2), which)[0][:k] * unit
        fresh = min(width, size - basis.shape[1])
        block, R = _orthonormal(W - basis @ H, basis, generator)
        full = basis.shape[1] + fresh > capacity
        if full or step >= next_check or step == maxiter:
            next_check = step + max(1, step // 8)
            values, vectors = eigh((projected + projected.mT) / 2, "the projected matrix")
            values, order = _select(values, which)
            vectors = vectors[:, order]
            scale = values.abs().max()
            residuals = (R @ vectors[-width:, :k]).norm(dim=0)
            residual = float(residuals.max() / scale) if scale > 0 else 0.0
            if len(values) >= k and residual <= tol:
                return values[:k] * unit
            if full:
                kept = min(len(values), k + (capacity - k) // 2)
                basis = basis @ vectors[:, :kept]
                projected = torch.diag(values[:kept])
        block = block[:, :fresh]
    raise RuntimeError(
        f"Lanczos did not converge: {k} eigenvalue(s) of a {size} x {size} matrix have relative residual "
        f"{residual:.1e} after {maxiter} products, above {tol:.1e}; raise maxiter or tol."
    )


def leading_eigenvector(matvec: Product, start: Tensor, tol: float, maxiter: int = 500) -> Tensor:
    """Find a leading eigenvector of a symmetric positive semidefinite matrix near a start that it is not orthogonal to.

    Args:
        matvec: maps (size,) to (size,).
        start: (size,).
        tol: residual norm relative to the eigenvalue.
        maxiter: products before giving up.

    Returns:
        (size,), of norm one; the start where the matrix maps it to zero.

    Raises:
        RuntimeError: when not converged after `maxiter` products.
        ValueError: when products are not finite.
    """
    start = start / start.abs().max().clamp_min(torch.finfo(start.dtype).tiny)  # squares of its entries may be 0
    q = start / start.norm().clamp_min(torch.finfo(start.dtype).tiny)
    unit = 0.0
    basis: list[Tensor] = []
    projected = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    for _ in range(maxiter):
        basis.append(q)
        Q = torch.stack(basis, 1)
        w = _finite(matvec(q))
        unit = unit or float(w.abs().max()) or 1.0
        w = w / unit
        h = Q.mT @ w
        projected = torch.nn.functional.pad(projected, (0, 1, 0, 1))
        projected[:, -1] = projected[-1, :] = h.double().cpu()
        w = w - Q @ h
        w = w - Q @ (Q.mT @ w)
        size = float(w.norm())
        values, vectors = eigh(projected, "the projected matrix")
        ritz = vectors[:, -1].to(start)
        if size * abs(float(vectors[-1, -1])) <= tol * float(values[-1]) or size == 0 or len(basis) == len(start):
            return Q @ ritz
        if len(basis) == _SINGLE:  # start again from the best vector so far
            basis, projected, q = [], projected.new_zeros(0, 0), Q @ ritz
        else:
            q = w / size
    raise RuntimeError(f"Lanczos did not find the leading eigenvector to {tol:.1e} in {maxiter} products.")


def spectral_norm(
    matvec: Product,
    rmatvec: Product,
    shape: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    tol: float | None = None,
    maxiter: int = 1000,
) -> float:
    """Largest singular value of a matrix M known by its products, from Lanczos on MᵀM or MMᵀ.

    Args:
        matvec: maps (cols, b) to (rows, b).
        rmatvec: maps (rows, b) to (cols, b), the transpose.
        shape: rows and columns.
        dtype: precision of the vectors.
        device: where the vectors live.
        tol: relative tolerance as in `extreme_eigenvalues`, of the squared value.
        maxiter: pairs of products before giving up.

    Returns:
        The spectral norm.

    Raises:
        RuntimeError: when not converged.
    """
    rows, cols = shape
    size, first, second = (cols, matvec, rmatvec) if rows >= cols else (rows, rmatvec, matvec)
    unit = 0.0

    def product(v: Tensor) -> Tensor:
        nonlocal unit
        image = _finite(first(v))
        unit = unit or float(image.abs().max()) or 1.0  # of M: MᵀM itself may leave the precision's range
        return second(image / unit) / unit

    largest = extreme_eigenvalues(product, size, 1, dtype=dtype, device=device, tol=tol, maxiter=maxiter)
    return unit * float(largest[0].clamp_min(0).sqrt())


def cg(
    matvec: Product,
    b: Tensor,
    tol: float | None = None,
    maxiter: int | None = None,
    *,
    preconditioner: Product | None = None,
) -> Tensor:
    """Solve M x = b for symmetric positive definite M by conjugate gradients, all columns of b at once.

    Args:
        matvec: maps (size, k) to (size, k).
        b: (size,) or (size, k).
        tol: residual ‖b − Mx‖ relative to ‖b‖, for every column; None: 1e-8 in float64, 1e-5 in float32, or as near to
            that as the precision comes, if that is within `LARGE`.
        maxiter: products before giving up; None: ten times the size, at most 10 000.
        preconditioner: applies an approximate inverse of M to (size, k).

    Returns:
        x of b's shape; NaN in columns where b is not finite, which the others do not hang on.

    Raises:
        NotSolvedError: when not converged, or when M shows a direction of no positive curvature.
        ValueError: when products are not finite.
    """
    columns = b.unsqueeze(1) if b.ndim == 1 else b
    unit = columns.abs().amax(0) if len(b) else columns.new_ones(columns.shape[1])
    unit = unit.where(unit != 0, torch.ones_like(unit))
    columns = columns / unit  # squares of entries beyond 1e19 or below 1e-19 leave float32's range
    known = columns.isfinite().all(0)
    columns, unit = columns.where(known, 0.0), unit.where(known, torch.nan)
    exactly, tol = tol is not None, _default_tolerance(b.dtype) if tol is None else tol
    maxiter = min(10 * len(b), 10_000) if maxiter is None else maxiter
    x, r = torch.zeros_like(columns), columns.clone()
    left = columns.norm(dim=0)
    target = tol * left
    z = r if preconditioner is None else preconditioner(r)
    p, rz = z, (r * z).sum(0)
    for step in progress_bar(range(maxiter + 1), "conjugate gradients", "product"):
        active = ~(r.norm(dim=0) <= target)  # of a tolerance that is no number as well
        if step and not bool(active.any()):  # the recursion's residual drifts from the true one
            r = columns - _finite(matvec(x))
            before, left = left, r.norm(dim=0)
            active = ~(left <= target)
            if bool((active & (left > before / 2)).any()):
                if not exactly and bool((left <= LARGE / tol * target).all()):
                    return (x * unit).reshape(b.shape)
                break
            z = r if preconditioner is None else preconditioner(r)
            p, rz = z, (r * z).sum(0)
        if not bool(active.any()):
            return (x * unit).reshape(b.shape)
        if step == maxiter:
            break
        Mp = _finite(matvec(p))
        curvature = (p * Mp).sum(0)
        if bool((curvature[active] <= 0).any()):
            raise NotSolvedError(
                f"conjugate gradients met curvature {float(curvature[active].min()):.3g} in step {step + 1}: "
                f"the {len(b)} x {len(b)} matrix is not positive definite; add damping."
            )
        # Finished columns stand still: their step is 0, never 0/0.
        alpha = torch.where(active, rz / curvature.where(active, torch.ones_like(rz)), torch.zeros_like(rz))
        x = x + alpha * p
        r = r - alpha * Mp
        z = r if preconditioner is None else preconditioner(r)
        rz_next = (r * z).sum(0)
        beta = torch.where(active, rz_next / rz.where(active, torch.ones_like(rz)), torch.zeros_like(rz))
        p, rz = z + beta * p, rz_next
    worst = float((r.norm(dim=0) / columns.norm(dim=0).clamp_min(torch.finfo(b.dtype).tiny)).max())
    raise NotSolvedError(
        f"conjugate gradients did not converge: relative residual {worst:.1e} after {step} products with "
        f"a {len(b)} x {len(b)} matrix, above {tol:.1e}; raise the damping, maxiter or tol."
    )


def log_quadratures(matvec: Product, z: Tensor, tol: float = 1e-4, maxiter: int = 400) -> Tensor:
    """zᵀ log(M) z for each column z, by Lanczos quadrature of a symmetric positive definite M (Ubaru et al. 2017).

    For random signs z the mean is log det M. No basis is kept: quadrature does not need orthogonality.

    Args:
        matvec: maps (size, k) to (size, k).
        z: (size, k).
        tol: change of every column's value, relative to it, between two looks at which iteration stops.
        maxiter: products before giving up.

    Returns:
        (k,) in float64.

    Raises:
        RuntimeError: when not converged, or when M shows an eigenvalue that is not positive.
        ValueError: when products are not finite.
    """
    length = z.norm(dim=0)
    before, q = torch.zeros_like(z), z / length
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    value = z.new_full((z.shape[1],), float("inf"), dtype=torch.float64)
    change = float("inf")
    for step in progress_bar(range(1, maxiter + 1), "Lanczos", "product"):
        Mq = _finite(matvec(q))
        diagonal.append((q * Mq).sum(0))
        w = Mq - diagonal[-1] * q - (off[-1] * before if off else 0.0)
        if step % 10 == 0 or step == len(z):
            T = torch.diag_embed(torch.stack(diagonal, 1).double())
            if off:
                beta = torch.stack(off, 1).double()
                T += torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
            values, vectors = eigh(T, "the Lanczos matrix")
            if not bool((values > 0).all()):
                raise RuntimeError(
                    f"a logarithm met the eigenvalue {float(values.min()):.3g}: the {len(z)} x {len(z)} matrix is not "
                    "positive definite; add damping."
                )
            found = length.double().square() * (vectors[:, 0].square() * values.log()).sum(1)
            change = float(((found - value).abs() / found.abs()).nan_to_num(0.0).max())
            value = found
            if change <= tol or step == len(z):
                return value
        off.append(w.norm(dim=0))
        before, q = q, w / off[-1].clamp_min(torch.finfo(z.dtype).tiny)
    raise RuntimeError(
        f"Lanczos quadrature did not converge: relative change {change:.1e} after {maxiter} products with a "
        f"{len(z)} x {len(z)} matrix, above {tol:.1e}; raise maxiter or tol."
    )


def _default_tolerance(dtype: torch.dtype) -> float:
    return 1e-8 if dtype == torch.float64 else 1e-5


def _select(values: Tensor, which: Which) -> tuple[Tensor, Tensor]:
    key = values.abs() if which == "magnitude" else values
    order = key.argsort(descending=which != "smallest")
    return values[order], order


def _finite(product: Tensor) -> Tensor:
    if not bool(torch.isfinite(product).all()):
        raise NonFiniteMatrixError("a product with the matrix gave NaN or infinity; look at the data and the weights.")
    return product


def _normal(size: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU in float64, so that every device and precision starts from the same vectors.
    return torch.randn(size, columns, generator=generator, dtype=torch.float64, device="cpu").to(like)


def _orthonormal(W: Tensor, basis: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal Q with W ≈ Q R and basisᵀ Q = 0; where W lacks rank, Q is drawn and R's row is 0."""
    size, width = W.shape
    W = W - basis @ (basis.mT @ W)
    R = W.new_zeros(width, width)
    known = basis
    floor = torch.finfo(W.dtype).eps * size**0.5 * W.norm()
    for column in range(width):
        if known.shape[1] == size:
            break
        w = W[:, column]
        start = basis.shape[1]
        for _ in range(2):
            overlap = known.mT @ w
            w = w - known @ overlap
            R[: known.shape[1] - start, column] += overlap[start:]
        length = w.norm()
        if length > floor:
            R[column, column] = length
        else:
            w = _normal(size, 1, W, generator)[:, 0]
            for _ in range(2):
                w = w - known @ (known.mT @ w)
            length = w.norm()
        known = torch.cat([known, (w / length)[:, None]], 1)
    return known[:, basis.shape[1] :], R
