"""Random operators of every class, each with its dense matrix by numpy in float64, and every operation on them.

Shared by the page's measurement and the quick tests. An operation is measured against dense linear algebra of the very
numbers that the operator holds, so that its error is that of the operation alone; what cannot be computed more sharply
in a precision is the condition of the question, which stands beside the error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.capture.captures import Capture
from fisherviz.matrices.example_operator import ExampleSpace
from fisherviz.operators import (
    BlockMatrix,
    BlockTridiagonal,
    Dense,
    Diagonal,
    DiagonalKronecker,
    DirectSum,
    Identity,
    Inverse,
    Kronecker,
    KroneckerDifferenceInverse,
    KroneckerEigen,
    KroneckerSum,
    Operator,
    Permuted,
    UnitBlocks,
    Zero,
    inner,
)
from fisherviz.operators.damping import FactoredTikhonov, Tikhonov
from fisherviz.statistics.examples import Examples

LARGEST_CONDITION = 1e4
"""Of the factors of random operators."""
STATED = {torch.float32: 1e-5, torch.float64: 1e-8}
"""Tolerances of Lanczos, which finds spectral norms of operators of more than 64 rows."""
SCALES = {torch.float32: 1e15, torch.float64: 1e60}
"""Factors have entries between these and their reciprocals, what stands alone between their squares, so that products
stay within the precision."""


class Draw:
    """Random matrices from one seed.

    Args:
        seed: of all that is drawn.
        dtype: that matrices are rounded to.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.random, self.dtype = np.random.default_rng(seed), dtype
        self.wide = 3 if seed % 10 == 9 else 1

    def size(self, most: int = 6) -> int:
        """A number of rows, one included; of every tenth seed a larger one."""
        return int(self.random.integers(1, self.wide * most + 1))

    def scale(self, alone: bool = False) -> float:
        """One half of the time, otherwise anything that the precision holds, of a factor or of what stands alone."""
        span = math.log10(SCALES[self.dtype]) * (1 + alone)
        return 1.0 if self.random.random() < 0.5 else float(10 ** self.random.uniform(-span, span))

    def matrix(self, *shape: int) -> Tensor:
        """Normal entries."""
        return torch.from_numpy(self.random.standard_normal(shape)).to(self.dtype)

    def positive(self, n: int, scale: float | None = None) -> Tensor:
        """A symmetric positive definite matrix of a random condition."""
        turn, _ = np.linalg.qr(self.random.standard_normal((n, n)))
        span = self.random.uniform(0, math.log10(LARGEST_CONDITION))
        values = 10 ** -self.random.uniform(0, span, n) * (self.scale() if scale is None else scale)
        made = torch.from_numpy((turn * values) @ turn.T).to(self.dtype)
        return torch.maximum(made, made.T)

    def orthogonal(self, n: int) -> Tensor:
        """An orthogonal matrix."""
        return torch.from_numpy(np.linalg.qr(self.random.standard_normal((n, n)))[0]).to(self.dtype)


def plain(x: Tensor) -> np.ndarray:
    """In numpy's float64."""
    return x.detach().double().numpy()


def _kron(G: Tensor, A: Tensor) -> np.ndarray:
    return np.kron(plain(G), plain(A))


def _direct(*blocks: np.ndarray) -> np.ndarray:
    out = np.zeros((sum(len(b) for b in blocks), sum(b.shape[1] for b in blocks)))
    row = col = 0
    for b in blocks:
        out[row : row + len(b), col : col + b.shape[1]] = b
        row, col = row + len(b), col + b.shape[1]
    return out


Made = tuple[Operator, np.ndarray]


def _identity(d: Draw) -> Made:
    n, x = d.size(), d.scale(alone=True)
    op = Identity(n, x, d.dtype)
    return op, float(op.factor) * np.eye(n)


def _diagonal(d: Draw) -> Made:
    x = (d.matrix(d.size()).abs() + 0.1) * d.scale(alone=True)
    return Diagonal(x), np.diag(plain(x))


def _dense(d: Draw) -> Made:
    M = d.positive(d.size(12), d.scale(alone=True))
    return Dense(M), plain(M)


def _units(d: Draw) -> Made:
    n, scale = d.size(), d.scale(alone=True)
    B = torch.stack([d.positive(n, scale) for _ in range(d.size(4))])
    return UnitBlocks(B), _direct(*map(plain, B))


def _kronecker(d: Draw) -> Made:
    A, G = d.positive(d.size()), d.positive(d.size())
    return Kronecker(A, G), _kron(G, A)


def _over_units(d: Draw) -> Made:
    A, n = d.positive(d.size()), d.size()
    return Kronecker.over_units(A, n), _kron(torch.eye(n), A)


def _diagonal_kronecker(d: Draw) -> Made:
    a, G = (d.matrix(d.size()).abs() + 0.1) * d.scale(), d.positive(d.size())
    return DiagonalKronecker(a, G), _kron(G, torch.diag(a))


def _eigen(d: Draw) -> Made:
    QA, QG = d.orthogonal(d.size()), d.orthogonal(d.size())
    S = (d.matrix(len(QG), len(QA)).abs() + 0.1) * d.scale(alone=True)
    given = QA if d.random.random() < 0.7 else None
    Q = _kron(QG, torch.eye(len(QA)) if given is None else QA)
    return KroneckerEigen(given, QG, S), (Q * plain(S).reshape(-1)) @ Q.T


def _sum(d: Draw) -> Made:
    a, g, scale = d.size(4), d.size(4), d.scale()
    pairs = [(d.positive(a, scale), d.positive(g, 1.0)) for _ in range(int(d.random.integers(1, 4)))]
    return KroneckerSum(pairs), sum(_kron(G, A) for A, G in pairs)


def _difference(d: Draw) -> Made:
    a, g = d.size(4), d.size(4)
    A, G, C, D = d.positive(a, 1.0), d.positive(g, 1.0), d.positive(a, 1.0), d.positive(g, 1.0)
    C, D = (0.5 * _least(M) / float(np.linalg.norm(plain(N), 2)) * N for M, N in ((A, C), (G, D)))
    op = KroneckerDifferenceInverse.from_difference(A, G, C, D)
    K = _kron(op.KG, op.KA)
    middle = op.weight / (1 - np.outer(plain(op.sG), plain(op.sA)))
    return op, (K * middle.reshape(-1)) @ K.T


def _least(M: Tensor) -> float:
    return float(np.linalg.eigvalsh(plain(M))[0])


def _sums(d: Draw) -> Made:
    parts = [_dense(d), _kronecker(d)] if d.random.random() < 0.5 else [_diagonal(d), _kronecker(d), _units(d)]
    return DirectSum([op for op, _ in parts]), _direct(*(M for _, M in parts))


def _pairs(d: Draw) -> Made:
    n, k = d.size(5) + 1, 1
    M = d.positive(n, d.scale(alone=True))
    blocks = {(0, 0): Dense(M[:k, :k]), (0, 1): Dense(M[:k, k:]), (1, 1): Dense(M[k:, k:])}
    return BlockMatrix(blocks), plain(M)


def _permuted(d: Draw) -> Made:
    (one, M), (two, N) = _dense(d), _kronecker(d)
    return Permuted(DirectSum([one, two]), [[1], [0]]), _direct(N, M)


def _inverse(d: Draw) -> Made:
    M = d.positive(d.size(10), d.scale(alone=True))
    dense = Dense(M)
    return Inverse(dense, [len(M)], lambda: dense.inverse().M), np.linalg.inv(plain(M))


def _chain(d: Draw) -> Made:
    """Moments of one set of rows, so that the chain's matrix is positive definite."""
    widths = [(d.size(3), d.size(3)) for _ in range(3)]
    a, g = (torch.cat([d.matrix(60, pair[k]) for pair in widths], 1) for k in (0, 1))
    a, g = a @ _mixing(d, a.shape[1]), g @ _mixing(d, g.shape[1])
    A, G = a.T @ a / 60, g.T @ g / 60
    A, G = torch.maximum(A, A.T), torch.maximum(G, G.T)
    ends = np.cumsum([[0, 0], *widths], 0)
    at = [[slice(ends[i][k], ends[i + 1][k]) for i in range(3)] for k in (0, 1)]
    own = [[M[s, s].clone() for s in where] for M, where in ((A, at[0]), (G, at[1]))]
    cross = [[M[where[i], where[i + 1]].clone() for i in range(2)] for M, where in ((A, at[0]), (G, at[1]))]
    op = BlockTridiagonal(own[0], own[1], cross[0], cross[1])
    blocks = {(i, i): _kron(own[1][i], own[0][i]) for i in range(3)}
    for i in range(2):
        blocks[i, i + 1] = _kron(cross[1][i], cross[0][i])
    blocks[0, 2] = blocks[0, 1] @ np.linalg.inv(blocks[1, 1]) @ blocks[1, 2]
    whole = [[blocks[i, j] if i <= j else blocks[j, i].T for j in range(3)] for i in range(3)]
    return op, np.block(whole)


def _mixing(d: Draw, n: int) -> Tensor:
    return torch.eye(n, dtype=d.dtype) + 0.2 * d.matrix(n, n)


def _example_space(d: Draw) -> Made:
    N, K, a, g = d.size(5), d.size(3), d.size(5), d.size(3)
    capture = Capture(d.matrix(N, 1, a), d.matrix(K, N, 1, g))
    op = ExampleSpace(Examples([capture], 1 / N)).shifted(float(d.random.uniform(0.01, 1)))
    U = np.einsum("nti,knto->knoi", plain(capture.a), plain(capture.g)).reshape(K * N, -1)
    return op, U.T @ U / N + op.shift * np.eye(U.shape[1])


def _example_units(d: Draw) -> Made:
    N, K, a, g = d.size(5), d.size(3), d.size(5), d.size(3)
    capture = Capture(d.matrix(N, 1, a), d.matrix(K, N, 1, g))
    op = ExampleUnits(capture, 1 / N, float(d.random.uniform(0.01, 1)))
    U = np.einsum("nti,knto->knoi", plain(capture.a), plain(capture.g)).reshape(K * N, g, a)
    return op, _direct(*(U[:, o].T @ U[:, o] / N + op.shift * np.eye(a) for o in range(g)))


POSITIVE: dict[str, Callable[[Draw], Made]] = {
    "Identity": _identity,
    "Diagonal": _diagonal,
    "Dense": _dense,
    "UnitBlocks": _units,
    "Kronecker": _kronecker,
    "Kronecker over units": _over_units,
    "DiagonalKronecker": _diagonal_kronecker,
    "KroneckerEigen": _eigen,
    "KroneckerSum": _sum,
    "KroneckerDifferenceInverse": _difference,
    "DirectSum": _sums,
    "BlockMatrix": _pairs,
    "BlockTridiagonal": _chain,
    "Permuted": _permuted,
    "Inverse": _inverse,
    "ExampleSpace": _example_space,
    "ExampleUnits": _example_units,
}
"""Symmetric positive definite operators by their class's name, perhaps with a word more."""


def _dense_block(d: Draw) -> Made:
    M = d.matrix(d.size(), d.size()) * d.scale(alone=True)
    return Dense(M), plain(M)


def _kronecker_block(d: Draw) -> Made:
    A, G = d.matrix(d.size(), d.size()) * d.scale(), d.matrix(d.size(), d.size()) * d.scale()
    return Kronecker(A, G), _kron(G, A)


def _sum_block(d: Draw) -> Made:
    a, g = (d.size(), d.size()), (d.size(), d.size())
    pairs = [(d.matrix(*a), d.matrix(*g)) for _ in range(3)]
    return KroneckerSum(pairs), sum(_kron(G, A) for A, G in pairs)


def _zero_block(d: Draw) -> Made:
    rows, cols = d.size(), d.size()
    return Zero(rows, cols, d.dtype), np.zeros((rows, cols))


BLOCKS: dict[str, Callable[[Draw], Made]] = {
    "Dense": _dense_block,
    "Kronecker": _kronecker_block,
    "KroneckerSum": _sum_block,
    "Zero": _zero_block,
}
"""Rectangular operators, as stand between two layers."""


@dataclass(frozen=True)
class Found:
    """What came out of one operation on one input.

    Args:
        operation: its name.
        error: relative to the right answer.
        condition: by how much the question magnifies rounding.
        size: rows of the matrix, the length of its sums.
    """

    operation: str
    error: float
    condition: float
    size: int


def off(found: Any, right: Any, scale: float | None = None) -> float:
    """The relative error; infinite for other shapes and for what is not finite."""
    mine = plain(found) if isinstance(found, Tensor) else np.asarray(found, dtype=np.float64)
    right = np.asarray(right, dtype=np.float64)
    if mine.shape != right.shape or not np.isfinite(mine).all():
        return math.inf
    size = norm_of(right) if scale is None else scale
    gap = norm_of(mine - right)
    return gap / size if size > 0 else (math.inf if gap > 0 else 0.0)


def norm_of(x: np.ndarray) -> float:
    """Frobenius, without overflow."""
    largest = float(np.abs(x).max()) if x.size else 0.0
    return largest * float(np.linalg.norm(x / largest)) if largest > 0 else 0.0


def measured(op: Operator, M: np.ndarray, draw: Draw, positive: bool) -> Iterator[Found]:
    """Every operation of an operator whose dense matrix is M; what its documentation refuses is left out.

    Args:
        op: the operator.
        M: its matrix.
        draw: of the vectors that it is applied to.
        positive: whether it is positive definite, so that it can be solved.
    """
    for name, question in (_QUESTIONS | (_SOLVES if positive else {})).items():
        if M.shape[0] == M.shape[1] or name not in _OF_SQUARE:
            with contextlib.suppress(NotImplementedError):
                yield Found(name, *question(Asked(op, M, draw)), max(M.shape))


@dataclass(frozen=True)
class Asked:
    """An operator, its matrix, and what draws the vectors."""

    op: Operator
    M: np.ndarray
    draw: Draw

    @cached_property
    def spectral(self) -> float:
        """The matrix's largest singular value."""
        return float(np.linalg.norm(self.M, 2)) if self.M.any() else 0.0

    @cached_property
    def condition(self) -> float:
        """By how much its inverse magnifies rounding."""
        if isinstance(self.op, ExampleSpace | ExampleUnits):  # known as a sum beside the damping, not by its entries
            return 1 + self.spectral / self.op.shift
        values = np.linalg.eigvalsh(self.M)
        return float(values[-1] / values[0]) if values[0] > 0 else math.inf

    @cached_property
    def entries(self) -> float:
        """By how much the matrix's own entries are magnified rounding: an inverse is known by what is inverted."""
        return self.condition if isinstance(self.op, Inverse) else 1.0

    @cached_property
    def value(self) -> float:
        """A damping."""
        return self.spectral * 10 ** -float(self.draw.random.uniform(0, 3))


Answer = tuple[float, float]
"""The relative error and the condition."""


def _product(q: Asked, *columns: int) -> Answer:
    v = q.draw.matrix(q.M.shape[1], *columns)
    right = q.M @ plain(v)
    return off(q.op @ v, right), q.entries * (q.spectral * norm_of(plain(v)) / norm_of(right) if right.any() else 1.0)


def _solve(q: Asked, *columns: int) -> Answer:
    v = q.draw.matrix(len(q.M), *columns)
    return off(q.op.solve(v), np.linalg.solve(q.M, plain(v))), q.condition


def _scale(q: Asked) -> Answer:
    factor = float(q.draw.random.uniform(0.5, 2))
    return off(q.op.scale(factor).to_dense(), factor * q.M), q.entries


def _inner(q: Asked) -> Answer:
    partner = Dense(q.draw.matrix(*q.M.shape))
    P = plain(partner.M)
    found = off(inner(q.op, partner), np.sum(q.M * P), norm_of(q.M) * norm_of(P))
    return max(found, off(inner(q.op, q.op), norm_of(q.M) ** 2)), q.entries


def _spectral_norm(q: Asked) -> Answer:
    iterated = STATED[q.draw.dtype] / torch.finfo(q.draw.dtype).eps / max(q.M.shape)
    return off(q.op.norm("spectral"), q.spectral), max(q.entries, iterated if min(q.M.shape) > 64 else 1.0)


def _determinant(q: Asked) -> Answer:
    size = len(q.M) * (1 + 4 * math.log(SCALES[q.draw.dtype]))  # logarithms of two factors may cancel
    return float(abs(q.op.log_determinant() - np.linalg.slogdet(q.M)[1])) / size, q.condition


def _root(q: Asked) -> Answer:
    root = plain(q.op.inverse_root(torch.eye(len(q.M), dtype=q.draw.dtype)))
    return off(root @ root.T, np.linalg.inv(q.M)), q.condition


def _damped(q: Asked, damping: Callable[[float], float | Tikhonov]) -> Answer:
    return off(q.op.damped(damping(q.value)).to_dense(), q.M + q.value * np.eye(len(q.M))), q.entries


def _factored(q: Asked) -> Answer:
    if not isinstance(q.op, Kronecker | DiagonalKronecker):
        raise NotImplementedError
    gamma, A = math.sqrt(q.value), q.op.A
    P, Q = (plain(torch.diag(X) if X.ndim == 1 else X) for X in (A, q.op.G))
    pi = math.sqrt(np.trace(P) / len(P) / (np.trace(Q) / len(Q)))
    right = np.kron(Q + gamma / pi * np.eye(len(Q)), P + pi * gamma * np.eye(len(P)))
    return off(q.op.damped(FactoredTikhonov(gamma)).to_dense(), right), 1.0


_QUESTIONS: dict[str, Callable[[Asked], Answer]] = {
    "product": _product,
    "product of columns": lambda q: _product(q, 3),
    "transpose": lambda q: (off(q.op.T.to_dense(), q.M.T), q.entries),
    "dense": lambda q: (off(q.op.to_dense(), q.M), q.entries),
    "diagonal": lambda q: (off(q.op.diagonal(), np.diag(q.M), q.spectral), q.entries),
    "trace": lambda q: (off(q.op.norm("trace"), np.trace(q.M), len(q.M) * q.spectral), q.entries),
    "norm, Frobenius": lambda q: (off(q.op.norm("fro"), norm_of(q.M)), q.entries),
    "norm, spectral": _spectral_norm,
    "inner product": _inner,
    "scale": _scale,
}
_SOLVES: dict[str, Callable[[Asked], Answer]] = {
    "solve": _solve,
    "solve of columns": lambda q: _solve(q, 3),
    "inverse": lambda q: (off(q.op.inverse().to_dense(), np.linalg.inv(q.M)), q.condition),
    "log determinant": _determinant,
    "root of the inverse": _root,
    "shifted": lambda q: (off(q.op.shifted(q.value).to_dense(), q.M + q.value * np.eye(len(q.M))), q.entries),
    "damped, number": lambda q: _damped(q, float),
    "damped, Tikhonov": lambda q: _damped(q, Tikhonov),
    "damped, factored": _factored,
}
_OF_SQUARE = {"diagonal", "trace"}
OPERATIONS = (*_QUESTIONS, *_SOLVES)


def sweep(seeds: range, dtype: torch.dtype) -> Iterator[tuple[str, int, Found]]:
    """All operations on operators of every class, one of each for each seed.

    Args:
        seeds: what is drawn.
        dtype: of the operators.

    Yields:
        The class, the seed and what was found.
    """
    for kinds, positive in ((POSITIVE, True), (BLOCKS, False)):
        for name, make in kinds.items():
            for seed in seeds:
                draw = Draw(seed, dtype)
                op, M = make(draw)
                for found in measured(op, M, draw, positive):
                    yield name, seed, found
