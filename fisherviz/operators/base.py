"""The abstract operator: a real matrix on flat layer vectors in unit order (W̄ of (d_out, d_a), row-major).

Subclasses are final, set `shape` and `tensors`, and supply the abstract methods below; checks of shapes and dtypes, and
vectors against matrices of columns, are settled here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, Protocol, Self, get_args

import torch
from torch import Tensor

from fisherviz.operators.lanczos import extreme_eigenvalues
from fisherviz.operators.residual import residual_of, tell
from fisherviz.support.choices import one_of
from fisherviz.support.tables import paragraph

NormOrder = Literal["fro", "spectral", "trace"]


class AppliesTo(Protocol):
    """What `Operator.damped` asks of a damping: see `fisherviz.operators.damping`."""

    def applied_to(self, operator: Operator) -> Operator:
        """Return the operator with this damping added."""
        ...


class Operator(ABC):
    """A real matrix known by its structure; immutable by convention, so that factorisations may be cached."""

    shape: tuple[int, int]
    """Rows and columns."""
    tensors: tuple[Tensor, ...]
    """The tensors that define the operator."""
    factored: ClassVar[bool] = False
    """Whether factored damping applies, so that `map_factors` answers."""
    _trusted = False

    @property
    def direct(self) -> bool:
        """Whether solves and the determinant come from factorisations, not from iterations."""
        return True

    @property
    @abstractmethod
    def T(self) -> Operator:
        """The transpose."""

    @abstractmethod
    def _matmul(self, v: Tensor) -> Tensor:
        """Multiply a checked (cols, k) matrix."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the (rows, cols) matrix itself."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the main diagonal of a square operator, (rows,)."""

    @abstractmethod
    def scale(self, factor: float) -> Operator:
        """Return the operator multiplied by a number."""

    @abstractmethod
    def _norm(self, order: NormOrder) -> float:
        """Return a norm whose name and squareness have been checked."""

    @abstractmethod
    def shifted(self, value: float) -> Operator:
        """Return the square operator plus `value` times the identity."""

    @abstractmethod
    def inverse(self) -> Operator:
        """Return the inverse of a positive definite operator.

        Raises:
            SingularMatrixError: naming the smallest eigenvalue, the size and the damping that would do.
        """

    @abstractmethod
    def _solve(self, v: Tensor) -> Tensor:
        """Apply the inverse to a checked (rows, k) matrix, by factorisation."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the entries."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the entries live."""
        return self.tensors[0].device

    @property
    def bytes(self) -> int:
        """Memory that the defining tensors hold, those that parts share once."""
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in self.tensors}.values())

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply a vector (cols,) or a matrix (cols, k).

        Args:
            v: in unit order.

        Returns:
            (rows,) or (rows, k).

        Raises:
            ValueError: when the shape does not fit.
            TypeError: when the dtype is another one.
        """
        columns = self._as_columns(v, self.shape[1])
        product = self._matmul(columns) if columns.shape[1] else columns.new_empty(self.shape[0], 0)
        return product.squeeze(1) if v.ndim == 1 else product

    def solve(self, v: Tensor) -> Tensor:
        """Apply the inverse by a factorisation that is made once and kept.

        Args:
            v: (rows,) or (rows, k).

        Returns:
            The solution, of v's shape.

        Raises:
            SingularMatrixError: when the operator is not positive definite.
            ValueError: when it is not square and symmetric or v does not fit.

        Warns:
            UserWarning: when more than a hundredth of v is left, unless the operator is trusted.
        """
        self.require_square("solve")
        columns = self._as_columns(v, self.shape[0])
        if not columns.shape[1]:
            return columns.clone()  # no column: nothing to solve
        solution = self._solve(columns)
        if not self._trusted:
            self._tell_residual(solution, columns)
        return solution.squeeze(1) if v.ndim == 1 else solution

    def _tell_residual(self, solution: Tensor, v: Tensor, where: str = "") -> None:
        """Warn where a solution is not one, by a product; operators that consist of others ask each."""
        if not self._trusted:
            what = f"{where}a {self.shape[0]} x {self.shape[1]} {type(self).__name__}"
            tell(residual_of(self._matmul(solution), v), what, self.dtype, self.norm)

    def inverse_root(self, z: Tensor) -> Tensor:
        """Apply a square root S of the inverse, S Sᵀ = M⁻¹: white noise becomes noise of covariance M⁻¹.

        S comes from the factorisation that solves use and is symmetric only where that is; what is promised is S Sᵀ.

        Args:
            z: (rows,) or (rows, k).

        Returns:
            S z, of z's shape.

        Raises:
            SingularMatrixError: when the operator is not positive definite.
            ValueError: when it is not square and symmetric or z does not fit.
            NotImplementedError: when its structure has no such root.
        """
        self.require_square("a root of the inverse")
        root = self._inverse_root(self._as_columns(z, self.shape[0]))
        return root.squeeze(1) if z.ndim == 1 else root

    def _inverse_root(self, z: Tensor) -> Tensor:
        """Apply the root to a checked (rows, k) matrix."""
        raise NotImplementedError(
            f"the inverse of a {self.shape[0]} x {self.shape[1]} {type(self).__name__} has no square root in closed "
            "form; take an approximation whose layers stand alone, or factored Tikhonov damping."
        )

    def log_determinant(self) -> float:
        """Logarithm of the determinant of a positive definite operator, from the factorisation that solves use.

        Returns:
            The value, summed in float64.

        Raises:
            SingularMatrixError: when the operator is not positive definite.
            NotImplementedError: when its structure has no determinant.
        """
        raise NotImplementedError(f"the structure of a {type(self).__name__} has no determinant.")

    def trust(self) -> Self:
        """Say that the operator is a damped second moment, so that checks of symmetry and rank may be left out."""
        self._trusted = True
        return self

    def norm(self, order: NormOrder = "fro") -> float:
        """Frobenius or spectral norm, or the trace, from the structure alone.

        Args:
            order: "fro", "spectral" or "trace" (square operators only).

        Returns:
            The value, accumulated in float64 where sums are long.

        Raises:
            ValueError: for another order, or the trace of a rectangular operator.
        """
        one_of("norm order", order, get_args(NormOrder))
        if order == "trace":
            self.require_square("trace")
        return self._norm(order)

    def damped(self, damping: float | AppliesTo | None) -> Operator:
        """Add damping.

        Args:
            damping: a number λ ≥ 0 (adds λI), a `Tikhonov` or `FactoredTikhonov`, or None for none.

        Returns:
            An operator that reuses this one's cached decompositions.

        Raises:
            ValueError: for a negative number or a rectangular operator.
            TypeError: for a damping that does not apply to this structure.
        """
        if damping is None:
            return self
        self.require_square("damping")
        if isinstance(damping, (int, float)):
            if not 0 <= damping < float("inf"):
                raise ValueError(f"damping must be a finite number of at least 0, not {damping}.")
            return self.shifted(float(damping))
        return damping.applied_to(self)

    def map_factors(self, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Operator:
        """Change the two factors of every Kronecker product; what has no factors refuses.

        Args:
            function: maps (A, G) to the new pair.

        Returns:
            An operator of the same structure.

        Raises:
            TypeError: when the operator is not made of Kronecker products.
        """
        raise TypeError(
            f"factored damping acts on the two factors of a Kronecker product, and {type(self).__name__} "
            f"has none; use Tikhonov(λ) with λ = γ²."
        )

    def each(self, function: Callable[[Operator], Operator]) -> Operator:
        """Change the blocks on the diagonal, one by one down to those that are no composition of others.

        Args:
            function: maps such a block to the new one.

        Returns:
            An operator of the same composition; `function(self)` where there is none.
        """
        return function(self)

    def require_square(self, action: str) -> None:
        """Refuse an action that has no meaning for a rectangular block.

        Args:
            action: its name, for the sentence.

        Raises:
            ValueError: when rows and columns differ in number.
        """
        rows, cols = self.shape
        if rows != cols:
            raise ValueError(f"{action} needs a square operator, this {type(self).__name__} is {rows} x {cols}.")

    def _as_columns(self, v: Tensor, length: int) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"a {type(self).__name__} multiplies tensors, not {type(v).__name__}; convert it first.")
        if v.ndim not in (1, 2) or v.shape[0] != length:
            raise ValueError(
                f"a {self.shape[0]} x {self.shape[1]} {type(self).__name__} takes ({length},) or "
                f"({length}, k), not {tuple(v.shape)}."
            )
        if v.dtype != self.dtype:
            raise TypeError(f"the operator is {self.dtype} and the vector {v.dtype}; cast one with .to().")
        return v.unsqueeze(1) if v.ndim == 1 else v

    def __repr__(self) -> str:
        """One line: structure, size, precision."""
        rows, cols = self.shape
        return f"{type(self).__name__}({rows} x {cols}, {str(self.dtype).removeprefix('torch.')})"

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return paragraph(repr(self))


class Symmetric(Operator):
    """An operator that is its own transpose."""

    @property
    def T(self) -> Self:
        """The transpose: itself."""
        return self

    def _largest_eigenvalue(self) -> float:
        """The largest eigenvalue in magnitude, by products alone; its magnitude is the spectral norm."""
        size, dtype, device = self.shape[0], self.dtype, self.device
        return abs(float(extreme_eigenvalues(self._matmul, size, which="magnitude", dtype=dtype, device=device)[0]))
