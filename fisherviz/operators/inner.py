"""The Frobenius inner product ⟨X, Y⟩ = Σ X_ij Y_ij of two operators, from their structures.

One rule per pair of classes, registered in either order with `rule`; a third party's class joins by
registering its own. Pairs without a rule are multiplied densely if they are small, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherviz.operators.base import Operator
from fisherviz.operators.dense import Dense, UnitBlocks
from fisherviz.operators.diagonal_kronecker import DiagonalKronecker
from fisherviz.operators.direct_sum import DirectSum
from fisherviz.operators.finite import dot
from fisherviz.operators.kronecker import Kronecker, KroneckerEigen
from fisherviz.operators.kronecker_sum import KroneckerSum
from fisherviz.operators.simple import Diagonal, Identity, Zero
from fisherviz.support.memory import require_dense

Rule = Callable[[Any, Any], float]
_rules: dict[tuple[type[Operator], type[Operator]], Rule] = {}
# These give every partner the same treatment, whatever the partner is; earlier entries win.
_universal: dict[type[Operator], Rule] = {}


def rule(left: type[Operator], right: type[Operator]) -> Callable[[Rule], Rule]:
    """Register the inner product of two classes; it serves both orders.

    Args:
        left: class of the rule's first argument.
        right: class of its second.

    Returns:
        A decorator that returns the function unchanged.
    """

    def register(function: Rule) -> Rule:
        _rules[left, right] = function
        return function

    return register


def inner(x: Operator, y: Operator) -> float:
    """Frobenius inner product of two operators, without a dense array where their structures allow.

    Args:
        x: an operator.
        y: an operator of the same shape.

    Returns:
        Σ_ij x_ij y_ij, accumulated in float64.

    Raises:
        ValueError: when the shapes differ.
        MemoryError: when the pair has no rule and is too large to be made dense.
    """
    if x.shape != y.shape:
        raise ValueError(f"inner needs operators of one shape, got {x.shape} and {y.shape}.")
    for left, right in ((x, y), (y, x)):
        if (function := _rules.get((type(left), type(right)))) is not None:
            return function(left, right)
    for kind, function in _universal.items():
        for left, right in ((x, y), (y, x)):
            if isinstance(left, kind):
                return function(left, right)
    return _dense(x, y)


def _dense(x: Operator, y: Operator) -> float:
    require_dense(*x.shape, f"the inner product of {type(x).__name__} and {type(y).__name__}", x.tensors[0])
    return dot(x.to_dense(), y.to_dense())


def _with_diagonal(x: Diagonal | Identity, y: Operator) -> float:
    return dot(x.diagonal(), y.diagonal())


def _with_direct_sum(x: DirectSum, y: Operator) -> float:
    parts = _segments(y, x.rows) if x.rows == x.cols else None
    if parts is None:
        return _dense(x, y)
    return sum(inner(op, part) for op, part in zip(x.operators, parts, strict=True))


def _segments(y: Operator, sizes: list[int]) -> list[Operator] | None:
    """Diagonal blocks of y over consecutive segments, or None where cutting would lose y's structure."""
    if isinstance(y, DirectSum):
        return list(y.operators) if y.rows == sizes and y.cols == sizes else None
    if isinstance(y, UnitBlocks) and all(size % (width := y.tensors[0].shape[1]) == 0 for size in sizes):
        return [UnitBlocks(B, y.shift) for B in y.tensors[0].split([size // width for size in sizes])]
    if isinstance(y, Dense):
        ends = torch.tensor(sizes, device="cpu").cumsum(0).tolist()
        return [Dense(y.M[end - size : end, end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    return None


_universal.update(
    {
        Zero: lambda x, y: 0.0,
        Diagonal: _with_diagonal,
        Identity: _with_diagonal,
        KroneckerSum: lambda x, y: sum(inner(term, y) for term in x.terms),
        DirectSum: _with_direct_sum,
    }
)


@rule(Dense, Dense)
def _dense_dense(x: Dense, y: Dense) -> float:
    return dot(x.M, y.M)


@rule(UnitBlocks, UnitBlocks)
def _units_units(x: UnitBlocks, y: UnitBlocks) -> float:
    return dot(x.B, y.B) if x.tensors[0].shape == y.tensors[0].shape else _dense(x, y)


@rule(Dense, UnitBlocks)
def _dense_units(x: Dense, y: UnitBlocks) -> float:
    d_out, d_a, _ = y.tensors[0].shape
    return dot(x.M.reshape(d_out, d_a, d_out, d_a).diagonal(dim1=0, dim2=2).permute(2, 0, 1), y.B)


@rule(Kronecker, Kronecker)
def _kronecker_kronecker(x: Kronecker, y: Kronecker) -> float:
    if x.A.shape != y.A.shape:
        return _dense(x, y)
    return dot(x.A, y.A) * dot(x.G, y.G)


@rule(UnitBlocks, Kronecker)
def _units_kronecker(x: UnitBlocks, y: Kronecker) -> float:
    if x.tensors[0].shape[1:] != y.A.shape:
        return _dense(x, y)
    return dot((x.B.double() * y.A.double()).sum((1, 2)), y.G.double().diagonal())


@rule(Dense, Kronecker)
def _dense_kronecker(x: Dense, y: Kronecker) -> float:
    # Rows of M by output unit: contracting with A leaves a matrix of G's shape, one block row at a time.
    (d_a, d_a_), (d_g, d_g_) = y.A.shape, y.G.shape
    against_a = torch.einsum("iajb,ab->ij", x.M.double().reshape(d_g, d_a, d_g_, d_a_), y.A.double())
    return dot(against_a, y.G)


@rule(KroneckerEigen, KroneckerEigen)
def _eigen_eigen(x: KroneckerEigen, y: KroneckerEigen) -> float:
    if x.S.shape != y.S.shape:
        return _dense(x, y)
    overlap_g = (x.QG.double().mT @ y.QG.double()).square()
    if x.QA is None and y.QA is None:
        return dot(x.S.double(), overlap_g @ y.S.double())
    if x.QA is None or y.QA is None:
        return _dense(x, y)
    overlap_a = (x.QA.double().mT @ y.QA.double()).square()
    return dot(x.S.double(), overlap_g @ y.S.double() @ overlap_a.mT)


@rule(KroneckerEigen, Kronecker)
def _eigen_kronecker(x: KroneckerEigen, y: Kronecker) -> float:
    if x.QA is None or x.QA.shape != y.A.shape:
        return _dense(x, y)
    in_basis_g = _rayleigh(x.QG.double(), y.G.double())
    in_basis_a = _rayleigh(x.QA.double(), y.A.double())
    return float(in_basis_g @ x.S.double() @ in_basis_a)


@rule(DiagonalKronecker, DiagonalKronecker)
def _diagonal_diagonal(x: DiagonalKronecker, y: DiagonalKronecker) -> float:
    if x.A.shape != y.A.shape:
        return _dense(x, y)
    return dot(x.A, y.A) * dot(x.G, y.G)


@rule(KroneckerEigen, DiagonalKronecker)
def _eigen_diagonal(x: KroneckerEigen, y: DiagonalKronecker) -> float:
    if x.QA is not None or x.S.shape != (len(y.G), len(y.A)):
        return _dense(x, y)
    return float(_rayleigh(x.QG.double(), y.G.double()) @ x.S.double() @ y.A.double())


@rule(Dense, DiagonalKronecker)
def _dense_diagonal(x: Dense, y: DiagonalKronecker) -> float:
    d_g, d_a = len(y.G), len(y.A)
    own = x.M.view(d_g, d_a, d_g, d_a).diagonal(dim1=1, dim2=3)  # (d_g, d_g, d_a)
    return dot(own.double() @ y.A.double(), y.G)


@rule(KroneckerEigen, UnitBlocks)
def _eigen_units(x: KroneckerEigen, y: UnitBlocks) -> float:
    if x.QA is None or y.tensors[0].shape[1:] != x.QA.shape:
        return _dense(x, y)
    # Unit o's diagonal block of x is QA diag(w_o) QAᵀ with w = QG² S.
    weights = x.QG.double().square() @ x.S.double()
    return dot(weights, _rayleigh(x.QA.double(), y.B.double()))


def _rayleigh(Q: Tensor, M: Tensor) -> Tensor:
    """Quadratic forms qᵀ M q of Q's columns, for one matrix or a batch."""
    return (Q * (M @ Q)).sum(-2)
