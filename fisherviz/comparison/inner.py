"""Frobenius inner products of exact blocks with structured operators, without the block (DESIGN section 6).

⟨F_ij, A ⊗ G⟩ and its like are sums over examples of products of small vectors; relative errors of layers with 10¹²
entries come from these and from Gram matrices. Sums run in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherviz.approximations.example_operator import ExampleSpace
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.capture.captures import AnyCapture, Capture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.operators import (
    Dense,
    Diagonal,
    DiagonalKronecker,
    Identity,
    Kronecker,
    KroneckerEigen,
    KroneckerSum,
    Operator,
    UnitBlocks,
    Zero,
)
from fisherviz.statistics.gradients import block_square_norm
from fisherviz.statistics.products import GRADIENT_ENTRIES, block

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


def inner_with_exact(fisher: Fisher, i: int, j: int, operator: Operator) -> float:
    """⟨F_ij, M⟩ for an operator M between the layers at two positions.

    Args:
        fisher: the exact Fisher.
        i: row layer.
        j: column layer.
        operator: M, (P_i, P_j) in unit order.

    Returns:
        The inner product.
    """
    if isinstance(operator, Zero):
        return 0.0
    captures = fisher.example_space()
    row, col = (captures[fisher.space.names[k]] for k in (i, j))
    return fisher.scale * _summed(row, col, operator)


def _summed(row: AnyCapture, col: AnyCapture, operator: Operator) -> float:
    """Σ_nk vec ∇ᵢᵀ M vec ∇ⱼ."""
    if isinstance(operator, KroneckerSum):
        return sum(_summed(row, col, term) for term in operator.terms)
    if isinstance(operator, Diagonal | Identity) and row is col:
        return _dot(row.square_sum(), operator.diagonal())
    if isinstance(operator, ExampleSpace) and row is col and _same(operator.capture, row):
        trace = float(row.square_sum().sum(dtype=torch.float64))
        return operator.factor * block_square_norm(row, col) + operator.shift * trace
    if isinstance(operator, ExampleUnits) and row is col and _same(operator.capture, row):
        trace = float(row.square_sum().sum(dtype=torch.float64))
        return operator.factor * operator.square_sum() + operator.shift * trace
    if isinstance(row, TokenCapture) and row is col:
        found = row.sparse
        if isinstance(operator, DiagonalKronecker):
            outputs = ((found.g @ operator.G) * found.g).sum((0, 2))
            return _dot(outputs, operator.A[found.token])
        if isinstance(operator, KroneckerEigen) and operator.QA is None:
            return _dot(replace(row, g=row.g @ operator.QG).square_sum(), operator.S.reshape(-1))
    if isinstance(row, Capture) and isinstance(col, Capture) and row.factored and col.factored:
        if isinstance(operator, Kronecker):
            inputs = ((row.a[:, 0] @ operator.A) * col.a[:, 0]).sum(1)
            outputs = ((row.g[:, :, 0] @ operator.G) * col.g[:, :, 0]).sum((0, 2))
            return _dot(inputs, outputs)
        if isinstance(operator, KroneckerEigen) and operator.QA is not None and row is col:
            turned = Capture(row.a @ operator.QA, row.g @ operator.QG)
            return _dot(turned.square_sum(), operator.S.reshape(-1))
        if isinstance(operator, UnitBlocks) and row is col:
            a = row.a[:, 0]
            weights = row.g[:, :, 0].square().sum(0)  # (N, d_out)
            forms = torch.stack([((a @ B) * a).sum(1) for B in operator.B], 1)
            return _dot(weights, forms)
    if isinstance(operator, Dense) and row.size * col.size <= GRADIENT_ENTRIES:
        return _dot(block(row, col), operator.M)
    return _through_gradients(row, col, operator)


def _same(one: AnyCapture, other: AnyCapture) -> bool:
    """Whether two captures hold the very same tensors."""
    return all(x is y for x, y in zip(one.tensors, other.tensors, strict=True))


def _through_gradients(row: AnyCapture, col: AnyCapture, operator: Operator) -> float:
    total = 0.0
    step = max(1, GRADIENT_ENTRIES // (4 * row.vectors * (row.size + col.size)))
    for start in range(0, row.examples, step):
        left = row.select(start, start + step).gradients.flatten(0, 1)
        right = left if row is col else col.select(start, start + step).gradients.flatten(0, 1)
        total += _dot(left, (operator @ right.T).T)
    return total


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
