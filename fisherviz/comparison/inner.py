"""Frobenius inner products of exact blocks with structured operators, without the block.

F_ij is a mean of (a_i a_jᵀ) ⊗ (g_i g_jᵀ) (Martens & Grosse 2015, section 3), so ⟨F_ij, A ⊗ G⟩ and its like are sums
over examples of products of small vectors; relative errors of layers with 10¹² entries come from these and from Gram
matrices. Sums over pieces run in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisherviz.approximations import FAILURES
from fisherviz.approximations.example_units import ExampleUnits
from fisherviz.capture.captures import AnyCapture, Capture, TiedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.matrices.example_operator import ExampleSpace
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
)
from fisherviz.operators.factorise import eigh
from fisherviz.operators.finite import dot
from fisherviz.statistics.gradients import block_square_norm
from fisherviz.statistics.products import GRADIENT_ENTRIES, block
from fisherviz.support.memory import at_once
from fisherviz.support.progress import progress_bar

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


Place = tuple[int, int]
"""Positions of a row and a column layer."""


def inner_with_exact(
    fisher: Fisher, matrices: Mapping[str, Mapping[Place, Operator]]
) -> dict[str, dict[Place, float] | Exception]:
    """⟨F_ij, M_ij⟩ for blocks of several matrices.

    What has no closed form is summed over per-example gradients, which are formed once for all matrices and blocks.

    Args:
        fisher: the exact Fisher.
        matrices: by label, the blocks between layers i and j, (P_i, P_j) in unit order.

    Returns:
        By label, the inner products, or what ended a matrix's.
    """
    captures = list(fisher.example_space().values())
    ranges = _Ranges()
    sums: dict[tuple[object, ...], _Sum] = {}  # methods have blocks in common, each of which is summed once
    asked: dict[str, dict[Place, _Sum]] = {}
    for label, blocks in matrices.items():
        asked[label] = {}
        for (i, j), operator in blocks.items():
            sides = [blocks.get((k, k)) for k in (i, j)] if i != j else []
            key = ((i, j), *map(_known_by, (operator, *sides)))
            if key not in sums:
                sums[key] = _begun((i, j), operator, sides, captures, ranges)
            asked[label][i, j] = sums[key]
    left = [each for each in sums.values() if each.value is None and each.error is None]
    for part in _pieces(captures, {k for each in left for k in each.place}):
        for each in left:
            each.add(part)
    return {
        label: next((each.error for each in places.values() if each.error is not None), None)
        or {place: fisher.scale * (each.value or 0.0) for place, each in places.items()}
        for label, places in asked.items()
    }


@dataclass
class _Sum:
    """Σ_nk ∇ᵢᵀ M ∇ⱼ, known, or to be summed over gradients, some examples at a time.

    Attributes:
        place: i and j.
        operator: M, on the gradients times the bases.
        bases: (da, r) for both sides; None: as they are.
        value: as far as it is known; None: not begun.
        error: what ended it.
    """

    place: Place
    operator: Operator
    bases: tuple[Tensor, Tensor] | None = None
    value: float | None = None
    error: Exception | None = None

    def add(self, part: _Piece) -> None:
        """Add what some examples show."""
        if self.error is None:
            try:
                self.value = (self.value or 0.0) + part.product(self)
            except FAILURES as error:
                self.error = error


def _known_by(operator: Operator | None) -> object:
    """What two operators are the same by: the very same object, or the same structure of the very same tensors."""
    if isinstance(operator, Kronecker | KroneckerEigen | UnitBlocks):
        shift = operator.shift if isinstance(operator, UnitBlocks) else 0.0
        return type(operator), shift, *map(id, operator.tensors)
    return id(operator)


def _begun(
    place: Place, operator: Operator, sides: Sequence[Operator | None], captures: Sequence[AnyCapture], ranges: _Ranges
) -> _Sum:
    """A sum with its value, where that has a closed form, else without."""
    i, j = place
    try:
        if (value := _summed(captures[i], captures[j], operator)) is not None:
            return _Sum(place, operator, value=value)
        if isinstance(operator, Kronecker) and i != j:
            return _Sum(place, *_narrowed(operator, *map(ranges.of, sides)))
    except FAILURES as error:
        return _Sum(place, operator, error=error)
    return _Sum(place, operator)


class _Ranges:
    """Bases (da, r) of what layers' first factors do not map to zero: of few examples' inputs, far fewer than da."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, own: Operator | None) -> Tensor | None:
        """That of a layer's own block; None: it has no factors."""
        if not isinstance(own, Kronecker):
            return None
        if id(own.A) not in self._found:
            values, vectors = eigh(own.A, "the A factor")
            kept = values > 10 * torch.finfo(values.dtype).eps * len(values) * values[-1]
            self._found[id(own.A)] = own.A, vectors[:, kept]
        return self._found[id(own.A)][1]


def _narrowed(
    operator: Kronecker, row: Tensor | None, col: Tensor | None
) -> tuple[Operator, tuple[Tensor, Tensor] | None]:
    """The same product with its A in the layers' ranges, where that loses nothing and saves much."""
    A = operator.A
    if row is None or col is None or 4 * (row.shape[1] + col.shape[1]) > 3 * sum(A.shape):
        return operator, None
    inner = row.mT @ A @ col
    lost = torch.linalg.matrix_norm(A - row @ inner @ col.mT)
    if lost > 1e2 * torch.finfo(A.dtype).eps * torch.linalg.matrix_norm(A):
        return operator, None
    return Kronecker(inner, operator.G), (row, col)


class _Piece:
    """What some examples show of layers, and what several sums take of it: gradients, and these times a basis.

    Args:
        captures: by layer, of R / K examples.
    """

    def __init__(self, captures: Mapping[int, AnyCapture]) -> None:
        self.captures = captures
        self._formed: dict[int, Tensor] = {}
        self._turned: dict[tuple[int, int], Tensor] = {}

    def rows(self, k: int) -> Tensor:
        """Per-example gradients (R, P) of a layer."""
        if k not in self._formed:
            self._formed[k] = self.captures[k].gradients.flatten(0, 1)
        return self._formed[k]

    def product(self, each: _Sum) -> float:
        """The sum over these examples."""
        (i, j), operator, bases = each.place, each.operator, each.bases
        if isinstance(operator, Kronecker):
            return self._kronecker(each.place, operator, bases)
        if isinstance(operator, KroneckerEigen) and operator.QA is not None and i == j:
            return dot(self._squares(i, operator.QA, operator.QG), operator.S)
        return dot(self.rows(i), (operator @ self.rows(j).T).T)

    def _kronecker(self, place: Place, operator: Kronecker, bases: tuple[Tensor, Tensor] | None) -> float:
        """Σ ⟨∇ᵢ, G ∇ⱼ Aᵀ⟩ in the way that takes the fewest multiply-adds.

        Either ∇ⱼ Aᵀ or ∇ᵢ A is formed and multiplied with the other gradients, for all examples together; or one side
        stays at its positions, where these are few, ⟨∇ᵢ, Σ_t (G g_t)(A a_t)ᵀ⟩ = Σ_t (G g_t)ᵀ ∇ᵢ (A a_t), or both do,
        Σ_st (a_s · A a_t)(g_s · G g_t).
        """
        (i, j), A, G = place, operator.A, operator.G
        a, b = (None, None) if bases is None else bases
        (p, q), (m, n), vectors = A.shape, G.shape, self.captures[i].vectors
        counts = {
            "right": vectors * n * p * (q + m),
            "left": vectors * m * q * (p + n),
            "right positions": self._positions(j) * (p * q + vectors * m * (p + n)),
            "left positions": self._positions(i) * (p * q + vectors * n * (q + m)),
            "both positions": self._positions(j) * (q * p + vectors * n * m + self._positions(i) * (p + vectors * m)),
        }
        match min(counts, key=lambda way: counts[way]):
            case "right":
                right = self._by_unit(j, n, b)
                right = (right.flatten(0, 1) @ A.mT).unflatten(0, right.shape[:2])
                return dot(self._by_unit(i, m, a).flatten(1) @ right.flatten(1).mT, G)
            case "left":
                left = self._by_unit(i, m, a)
                left = (left.flatten(0, 1) @ A).unflatten(0, left.shape[:2])
                return dot(left.flatten(1) @ self._by_unit(j, n, b).flatten(1).mT, G)
            case "right positions":
                return self._at_positions(i, a, j, b, A, G)
            case "left positions":
                return self._at_positions(j, b, i, a, A.mT, G.mT)
            case _:
                return self._of_positions(i, a, j, b, A, G)

    def _positions(self, k: int) -> float:
        """T of a layer whose inputs and pseudo-gradients are there, in one group."""
        capture = self.captures[k]
        return capture.positions if isinstance(capture, Capture) and not capture.grouped else float("inf")

    def _at_positions(self, i: int, a: Tensor | None, j: int, b: Tensor | None, A: Tensor, G: Tensor) -> float:
        """Σ_nkt (G g_nkt)ᵀ ∇ᵢ (A a_nt) with layer j's positions; a and b are the layers' bases."""
        capture = self.captures[j]
        assert isinstance(capture, Capture)
        images = (capture.a if b is None else capture.a @ b) @ A.mT  # (N, T, p)
        total = 0.0
        rows = self.rows(i).unflatten(0, (capture.vectors, -1)).unflatten(2, (len(G), -1))  # (K, N, m, da)
        for own, g in zip(rows, capture.g, strict=True):
            own = own if a is None else own @ a
            total += dot(torch.bmm(images, own.mT), g @ G.mT)
        return total

    def _of_positions(self, i: int, a: Tensor | None, j: int, b: Tensor | None, A: Tensor, G: Tensor) -> float:
        """Σ_nkst (a_ns · A a_nt)(g_nks · G g_nkt)."""
        left, right = self.captures[i], self.captures[j]
        assert isinstance(left, Capture)
        assert isinstance(right, Capture)
        inputs = left.a if a is None else left.a @ a
        images = (right.a if b is None else right.a @ b) @ A.mT
        outputs = sum(torch.bmm(x, (y @ G.mT).mT) for x, y in zip(left.g, right.g, strict=True))
        assert isinstance(outputs, Tensor)
        return dot(torch.bmm(inputs, images.mT), outputs)

    def _squares(self, k: int, QA: Tensor, QG: Tensor) -> Tensor:
        """Σ (QGᵀ ∇ QA)², entry by entry: (dg, da)."""
        capture, (m, p) = self.captures[k], (len(QG), len(QA))
        count = capture.vectors * m * p * (p + m)
        if self._positions(k) * (p * p + capture.vectors * m * (m + p)) < count:
            assert isinstance(capture, Capture)
            return Capture(capture.a @ QA, capture.g @ QG).square_sum().view(m, p)
        turned = self._by_unit(k, m).flatten(0, 1) @ QA
        turned = QG.mT @ turned.view(m, -1)
        return turned.square_().view(m, -1, p).sum(1)

    def _by_unit(self, k: int, units: int, basis: Tensor | None = None) -> Tensor:
        """Gradients of each output unit, (units, R, da), or times a basis, (units, R, r)."""
        key = (k, id(basis))
        if key not in self._turned:
            rows = self.rows(k)
            rows = rows.view(len(rows), units, -1).transpose(0, 1)
            self._turned[key] = rows.contiguous() if basis is None else rows @ basis
        return self._turned[key]


def _pieces(captures: Sequence[AnyCapture], layers: Collection[int]) -> Iterator[_Piece]:
    """What is shown of some layers, of as many examples at a time as fit with their gradients."""
    if not layers:
        return
    size = captures[0].vectors * sum(captures[k].size for k in layers)
    step = max(1, at_once(GRADIENT_ENTRIES, captures[0].tensors[0]) // (2 * size))
    for start in progress_bar(range(0, captures[0].examples, step), "inner products", "piece"):
        yield _Piece({k: captures[k].select(start, start + step) for k in layers})


def _summed(row: AnyCapture, col: AnyCapture, operator: Operator) -> float | None:
    """Σ_nk vec ∇ᵢᵀ M vec ∇ⱼ where it has a closed form."""
    if isinstance(operator, KroneckerSum):
        terms = [_summed(row, col, term) for term in operator.terms]
        return None if None in terms else sum(term for term in terms if term is not None)
    if isinstance(operator, Diagonal | Identity) and row is col:
        return dot(row.square_sum(), operator.diagonal())
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
            return dot(outputs, operator.A[found.token])
        if isinstance(operator, KroneckerEigen) and operator.QA is None:
            return dot(replace(row, g=row.g @ operator.QG).square_sum(), operator.S.reshape(-1))
    if isinstance(row, TiedCapture) and row is col and isinstance(operator, KroneckerEigen) and operator.QA is None:
        return dot(row.turned(operator.QG).square_sum(), operator.S.reshape(-1))
    if isinstance(row, Capture) and isinstance(col, Capture) and row.factored and col.factored:
        if isinstance(operator, Kronecker):
            (A, size_a), (G, size_g) = map(_of_size_one, (operator.A, operator.G))
            inputs = ((row.a[:, 0] @ A) * col.a[:, 0]).sum(1)
            outputs = ((row.g[:, :, 0] @ G) * col.g[:, :, 0]).sum((0, 2))
            return size_a * size_g * dot(inputs, outputs)
        if isinstance(operator, KroneckerEigen) and operator.QA is not None and row is col:
            turned = Capture(row.a @ operator.QA, row.g @ operator.QG)
            return dot(turned.square_sum(), operator.S.reshape(-1))
        if isinstance(operator, UnitBlocks) and row is col:
            a = row.a[:, 0]
            weights = row.g[:, :, 0].square().sum(0)  # (N, d_out)
            forms = torch.stack([((a @ B) * a).sum(1) for B in operator.B], 1)
            return dot(weights, forms)
    if isinstance(operator, Dense) and row.size * col.size <= at_once(GRADIENT_ENTRIES, row.tensors[0]):
        return dot(block(row, col), operator.M)
    return None


def _of_size_one(M: Tensor) -> tuple[Tensor, float]:
    """A matrix over its largest entry, and that: its products with what it is a moment of stay within the range."""
    size = float(M.abs().max()) or 1.0
    return M / size, size


def _same(one: AnyCapture, other: AnyCapture) -> bool:
    """Whether two captures hold the very same tensors."""
    return all(x is y for x, y in zip(one.tensors, other.tensors, strict=True))
