"""Structured matrices over all probed layers: one operator per layer, or per pair, seen in any of the three orders.

What `fv.approximate` gives, and its damped and inverted forms. Vectors come in torch order; operators are in unit
order. Solves of full matrices are dense where that fits and conjugate gradients otherwise.
"""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from fisherviz.network.layers import LayerInfo
from fisherviz.network.space import ORDERS, Order, ParameterSpace
from fisherviz.operators import (
    BlockTridiagonal,
    Dense,
    DirectSum,
    Kronecker,
    Operator,
    Zero,
    cg,
    extreme_eigenvalues,
)
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.support.memory import require

_DENSE_SOLVE = 6000
"""Full matrices up to this size are solved by Cholesky, larger ones by conjugate gradients."""


class LayeredMatrix(ABC):
    """A symmetric matrix over the probed parameters, known by operators between layers.

    Flat vectors and dense matrices are in torch order unless an order is named.
    """

    def __init__(self, space: ParameterSpace) -> None:
        self.space = space

    @abstractmethod
    def operator(self, i: int, j: int) -> Operator:
        """The operator between the layers at two positions, in unit order."""

    @abstractmethod
    def _product(self, pieces: list[Tensor]) -> list[Tensor]:
        """Product with one unit-order (P_i, k) piece per layer."""

    @abstractmethod
    def _solved(self, pieces: list[Tensor]) -> list[Tensor]:
        """Inverse times one unit-order (P_i, k) piece per layer."""

    @abstractmethod
    def damped(self, damping: float | Damping | None) -> LayeredMatrix:
        """The matrix with damping added: a number or `Tikhonov` adds λI, `FactoredTikhonov` damps Kronecker factors."""

    @abstractmethod
    def scale(self, factor: float) -> LayeredMatrix:
        """The matrix times a positive number."""

    @abstractmethod
    def norm(self, ord: str = "fro") -> float:
        """Norm "fro", "spectral" or "trace", from the structure."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Memory that the operators hold."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self.space.size, self.space.size)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """What the layers are, in torch order."""
        return tuple(layer.info() for layer in self.space.layers)

    @cached_property
    def _like(self) -> Tensor:
        parameter = next(iter(self.space.layers[0].parameters.values()))
        return parameter.detach().new_empty(0)

    def block(self, row: str | int, col: str | int | None = None) -> Tensor:
        """Dense block between two layers in torch order, (P_row, P_col); col None: the diagonal block."""
        i = self.space.position(row)
        j = i if col is None else self.space.position(col)
        return self.space.reorder_block(self.operator(i, j).to_dense(), i, j, "torch")

    def to_dense(self, order: Order = "torch") -> Tensor:
        """The whole matrix (P, P) in "torch", "unit" or "input" order.

        Raises:
            ValueError: the order is unknown.
            MemoryError: it does not fit.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}.")
        size = 3 * self.space.size**2 * self._like.element_size()
        require(
            size,
            self._like.device,
            f"the dense {self.shape[0]:,} x {self.shape[1]:,} matrix",
            "ask for products or blocks instead",
        )
        n = len(self.space.layers)
        rows = [torch.cat([self.operator(i, j).to_dense() for j in range(n)], 1) for i in range(n)]
        return self.space.reorder_unit_dense(torch.cat(rows), order)

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Product with v flat (P,) or (P, k) in torch order, or a dictionary like `named_parameters()`."""
        if isinstance(v, Mapping):
            return self.space.unflatten(self @ self.space.flatten(v))
        return self._on_columns(v, self._product)

    @overload
    def solve(self, v: Tensor, damping: float | Damping | None = None) -> Tensor: ...
    @overload
    def solve(self, v: Mapping[str, Tensor], damping: float | Damping | None = None) -> dict[str, Tensor]: ...
    def solve(
        self, v: Tensor | Mapping[str, Tensor], damping: float | Damping | None = None
    ) -> Tensor | dict[str, Tensor]:
        """(M + damping)⁻¹ v.

        Args:
            v: flat (P,) or (P, k) in torch order, or a dictionary.
            damping: a number (Tikhonov), `Tikhonov`, `FactoredTikhonov`, or None.

        Returns:
            Like v.

        Raises:
            RuntimeError: the damped matrix is singular; the message says which damping would do.
        """
        if isinstance(v, Mapping):
            return self.space.unflatten(self.solve(self.space.flatten(v), damping))
        matrix = self if damping is None else self.damped(damping)
        return self._on_columns(v, matrix._solved)

    def _on_columns(self, v: Tensor, function) -> Tensor:  # type: ignore[no-untyped-def]
        if not isinstance(v, Tensor):
            raise TypeError(f"a vector is a tensor or a dictionary name -> tensor, got {type(v).__name__}.")
        if v.is_complex():
            raise TypeError("a vector must be real, got a complex tensor; multiply its real and imaginary parts apart.")
        # operators of half-precision models are float32, like their statistics; a vector is handed back as it came
        given = self._like.dtype if v.dtype == self._like.dtype else self._work
        v = v.detach().to(device=self._like.device, dtype=self._work)
        pieces = self.space.split(v)
        flat = v.dim() == 1
        out = self.space.join(function([p.unsqueeze(1) for p in pieces] if flat else pieces)).to(given)
        return out[:, 0] if flat else out

    @property
    def _work(self) -> torch.dtype:
        return torch.promote_types(self._like.dtype, torch.float32)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.shape[0]:,} x {self.shape[1]:,} over {len(self.space.layers)} layers"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"

    def inverse(self, damping: float | Damping | None = None) -> LayeredMatrix:
        """The inverse of the damped matrix, as a structured matrix of its own."""
        return Inverse(self.damped(damping))

    def diagonal(self) -> Tensor:
        """Diagonal, flat in torch order, (P,)."""
        return self.space.join([self.operator(i, i).diagonal() for i in range(len(self.space.layers))])


class BlockDiagonal(LayeredMatrix):
    """One operator per layer; everything between layers is zero."""

    def __init__(self, space: ParameterSpace, operators: Sequence[Operator]) -> None:
        super().__init__(space)
        self.operators = tuple(operators)

    def operator(self, i: int, j: int) -> Operator:
        """The layer's operator, or zero."""
        if i == j:
            return self.operators[i]
        return Zero(self.space.sizes[i], self.space.sizes[j], dtype=self._work, device=self._like.device)

    def _product(self, pieces: list[Tensor]) -> list[Tensor]:
        return [op @ piece for op, piece in zip(self.operators, pieces, strict=True)]

    def _solved(self, pieces: list[Tensor]) -> list[Tensor]:
        return [self._named(i, lambda i=i: self.operators[i].solve(pieces[i])) for i in range(len(pieces))]

    def _named(self, i: int, action):  # type: ignore[no-untyped-def]
        try:
            return action()
        except RuntimeError as error:
            raise RuntimeError(f"layer {self.space.names[i]!r}: {error}") from error

    def damped(self, damping: float | Damping | None) -> BlockDiagonal:
        """Every layer's operator damped; layers without Kronecker factors take λ = γ² under `FactoredTikhonov`."""
        return BlockDiagonal(self.space, [damp(op, as_damping(damping)) for op in self.operators])

    def scale(self, factor: float) -> BlockDiagonal:
        """Every operator times a number."""
        return BlockDiagonal(self.space, [op.scale(factor) for op in self.operators])

    def inverse(self, damping: float | Damping | None = None) -> BlockDiagonal:
        """Every layer's damped operator inverted."""
        matrix = self.damped(damping)
        return BlockDiagonal(
            self.space,
            [matrix._named(i, lambda i=i: matrix.operators[i].inverse()) for i in range(len(self.operators))],
        )

    def norm(self, ord: str = "fro") -> float:
        """Norm from the layers' norms."""
        return DirectSum(self.operators).norm(ord)  # type: ignore[arg-type]

    @property
    def bytes(self) -> int:
        """Memory of the layers' operators."""
        return sum(op.bytes for op in self.operators)


class FullMatrix(LayeredMatrix):
    """An operator for each pair of layers, given on and above the diagonal."""

    def __init__(self, space: ParameterSpace, operators: Mapping[tuple[int, int], Operator]) -> None:
        super().__init__(space)
        self.operators = dict(operators)

    def operator(self, i: int, j: int) -> Operator:
        """The pair's operator, by transposition below the diagonal; zero where none was given."""
        if (i, j) in self.operators:
            return self.operators[i, j]
        if (j, i) in self.operators:
            return self.operators[j, i].T
        return Zero(self.space.sizes[i], self.space.sizes[j], dtype=self._work, device=self._like.device)

    def _product(self, pieces: list[Tensor]) -> list[Tensor]:
        n = len(pieces)
        out = [torch.zeros_like(piece) for piece in pieces]
        for i in range(n):
            for j in range(n):
                op = self.operator(i, j)
                if not isinstance(op, Zero):
                    out[i] = out[i] + op @ pieces[j]
        return out

    @cached_property
    def _dense(self) -> Dense:
        return Dense(self.to_dense("unit"))

    def _solved(self, pieces: list[Tensor]) -> list[Tensor]:
        if all(i == j or isinstance(op, Zero) for (i, j), op in self.operators.items()):
            diagonal = [self.operator(i, i) for i in range(len(self.space.layers))]
            return BlockDiagonal(self.space, diagonal)._solved(pieces)
        stacked = torch.cat(pieces)
        if self.space.size <= _DENSE_SOLVE:
            return list(self._dense.solve(stacked).split(self.space.sizes))
        columns = [cg(self._stacked_product, column) for column in stacked.unbind(1)]
        return list(torch.stack(columns, 1).split(self.space.sizes))

    def _stacked_product(self, v: Tensor) -> Tensor:
        flat = v.dim() == 1
        out = torch.cat(self._product(list((v.unsqueeze(1) if flat else v).split(self.space.sizes))))
        return out[:, 0] if flat else out

    def damped(self, damping: float | Damping | None) -> FullMatrix:
        """Diagonal blocks damped; off-diagonal ones stay as they are."""
        rule = as_damping(damping)
        return FullMatrix(
            self.space, {(i, j): damp(op, rule) if i == j else op for (i, j), op in self.operators.items()}
        )

    def scale(self, factor: float) -> FullMatrix:
        """Every operator times a number."""
        return FullMatrix(self.space, {pair: op.scale(factor) for pair, op in self.operators.items()})

    def norm(self, ord: str = "fro") -> float:
        """Norm from the pairs' norms; spectral by Lanczos on products."""
        if ord == "spectral":
            top = extreme_eigenvalues(
                self._stacked_product,
                self.space.size,
                which="magnitude",
                dtype=self._work,
                device=self._like.device,
            )
            return abs(float(top[0]))
        if ord == "trace":
            return sum(op.norm("trace") for (i, j), op in self.operators.items() if i == j)
        squares = ((1 if i == j else 2) * op.norm("fro") ** 2 for (i, j), op in self.operators.items())
        if ord != "fro":
            raise ValueError(f"ord must be one of fro, spectral, trace, got {ord!r}.")
        return float(sum(squares)) ** 0.5

    @property
    def bytes(self) -> int:
        """Memory of the pairs' operators, shared factors counted once."""
        tensors = {t.data_ptr(): t.numel() * t.element_size() for op in self.operators.values() for t in op.tensors}
        return sum(tensors.values())


class TridiagonalInverse(LayeredMatrix):
    """F̂, the matrix whose inverse is block-tridiagonal along chains of layers (K-FAC paper, section 4.3).

    `chain` holds the positions of the layers in F̂'s order; layers outside it (generic ones) keep their own operator.
    """

    def __init__(
        self,
        space: ParameterSpace,
        chain: Sequence[int],
        tridiagonal: BlockTridiagonal,
        rest: Mapping[int, Operator],
    ) -> None:
        super().__init__(space)
        self.chain = tuple(chain)
        self.tridiagonal = tridiagonal
        self.rest = dict(rest)

    def operator(self, i: int, j: int) -> Operator:
        """F̂'s block, one Kronecker product."""
        if i in self.chain and j in self.chain:
            return self.tridiagonal.block(self.chain.index(i), self.chain.index(j))
        if i == j:
            return self.rest[i]
        return Zero(self.space.sizes[i], self.space.sizes[j], dtype=self._work, device=self._like.device)

    def _in_chain(self, pieces: list[Tensor], on_chain, on_rest) -> list[Tensor]:  # type: ignore[no-untyped-def]
        out = [on_rest(i, piece) if i in self.rest else piece for i, piece in enumerate(pieces)]
        stacked = on_chain(torch.cat([pieces[i] for i in self.chain]))
        for i, piece in zip(self.chain, stacked.split([self.space.sizes[i] for i in self.chain]), strict=True):
            out[i] = piece
        return out

    def _product(self, pieces: list[Tensor]) -> list[Tensor]:
        return self._in_chain(pieces, self.tridiagonal.__matmul__, lambda i, piece: self.rest[i] @ piece)

    def _solved(self, pieces: list[Tensor]) -> list[Tensor]:
        try:
            return self._in_chain(pieces, self.tridiagonal.solve, lambda i, piece: self.rest[i].solve(piece))
        except RuntimeError as error:
            names = ", ".join(repr(self.space.names[i]) for i in self.chain)
            raise RuntimeError(f"the chain of layers {names}: {error}") from error

    def damped(self, damping: float | Damping | None) -> LayeredMatrix:
        """`FactoredTikhonov` before Ψ and Σ; plain Tikhonov leaves the structure: F̂ + λI with dense or CG solves."""
        rule = as_damping(damping)
        if rule is None:
            return self
        if isinstance(rule, FactoredTikhonov):
            chain = self.tridiagonal.damped(rule)
            assert isinstance(chain, BlockTridiagonal)
            return TridiagonalInverse(self.space, self.chain, chain, {i: damp(op, rule) for i, op in self.rest.items()})
        n = len(self.space.layers)
        pairs = {(i, j): self.operator(i, j) for i in range(n) for j in range(i, n)}
        return FullMatrix(self.space, {k: op for k, op in pairs.items() if not isinstance(op, Zero)}).damped(rule)

    def scale(self, factor: float) -> TridiagonalInverse:
        """F̂ times a positive number."""
        rest = {i: op.scale(factor) for i, op in self.rest.items()}
        return TridiagonalInverse(self.space, self.chain, self.tridiagonal.scale(factor), rest)

    def norm(self, ord: str = "fro") -> float:
        """Norm from F̂'s blocks and the other layers' operators."""
        return DirectSum([self.tridiagonal, *self.rest.values()]).norm(ord)  # type: ignore[arg-type]

    @property
    def bytes(self) -> int:
        """Memory of the factors."""
        return self.tridiagonal.bytes + sum(op.bytes for op in self.rest.values())


class Inverse(LayeredMatrix):
    """The inverse of a matrix that couples layers: products are solves, blocks come from the dense inverse."""

    def __init__(self, matrix: LayeredMatrix) -> None:
        super().__init__(matrix.space)
        self.matrix = matrix

    @cached_property
    def _dense(self) -> Tensor:
        if isinstance(self.matrix, TridiagonalInverse):
            return self._tridiagonal_dense(self.matrix)
        return Dense(self.matrix.to_dense("unit")).inverse().to_dense()

    def _tridiagonal_dense(self, matrix: TridiagonalInverse) -> Tensor:
        offsets = self.space.offsets
        out = self._like.new_zeros(self.shape, dtype=self._work)
        index = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in matrix.chain]).to(out.device)
        out[index.unsqueeze(1), index] = matrix.tridiagonal.inverse_dense()
        for i, op in matrix.rest.items():
            out[offsets[i] : offsets[i + 1], offsets[i] : offsets[i + 1]] = op.inverse().to_dense()
        return out

    def operator(self, i: int, j: int) -> Operator:
        """A dense block of the inverse."""
        offsets = self.space.offsets
        return Dense(self._dense[offsets[i] : offsets[i + 1], offsets[j] : offsets[j + 1]])

    def _product(self, pieces: list[Tensor]) -> list[Tensor]:
        return self.matrix._solved(pieces)

    def _solved(self, pieces: list[Tensor]) -> list[Tensor]:
        return self.matrix._product(pieces)

    def damped(self, damping: float | Damping | None) -> LayeredMatrix:
        """Only None: damping belongs to the matrix before it is inverted."""
        if as_damping(damping) is None:
            return self
        raise NotImplementedError("damp the matrix before inverting it: approx.inverse(damping).")

    def scale(self, factor: float) -> Inverse:
        """The inverse times a number."""
        return Inverse(self.matrix.scale(1 / factor))

    def norm(self, ord: str = "fro") -> float:
        """Norm of the dense inverse."""
        return Dense(self._dense).norm(ord)  # type: ignore[arg-type]

    @property
    def bytes(self) -> int:
        """Memory of the matrix that is inverted."""
        return self.matrix.bytes


def damp(operator: Operator, damping: Damping | None) -> Operator:
    """A layer's operator with damping; one without Kronecker factors takes Tikhonov λ = γ² under `FactoredTikhonov`."""
    if damping is None:
        return operator
    if isinstance(damping, FactoredTikhonov) and not _has_factors(operator):
        return operator.damped(Tikhonov(damping.gamma**2))
    return operator.damped(damping)


def _has_factors(operator: Operator) -> bool:
    if isinstance(operator, DirectSum):
        return all(_has_factors(part) for part in operator.operators)
    return isinstance(operator, Kronecker)
