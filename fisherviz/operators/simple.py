"""The three operators without factors: a multiple of the identity, a diagonal, and zero.

All act entry by entry in unit order. They are what identity, diagonal and uncoupled layer pairs become.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fisherviz.operators.base import NormOrder, Operator, Symmetric
from fisherviz.operators.factorise import SingularMatrixError, require_positive, sufficient_damping


class Diagonal(Symmetric):
    """diag(d).

    Args:
        d: (P,) the diagonal entries.
    """

    def __init__(self, d: Tensor) -> None:
        """Keep the entries."""
        if d.ndim != 1:
            raise ValueError(f"Diagonal takes a vector of entries, not a tensor of shape {tuple(d.shape)}.")
        self.d = d
        self.shape, self.tensors = (len(d), len(d)), (d,)

    def _matmul(self, v: Tensor) -> Tensor:
        return self.d[:, None] * v

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return torch.diag(self.d)

    def diagonal(self) -> Tensor:
        """Return the entries."""
        return self.d

    def scale(self, factor: float) -> Diagonal:
        """Multiply by a number."""
        return Diagonal(self.d * factor)

    def shifted(self, value: float) -> Diagonal:
        """Add a multiple of the identity."""
        return Diagonal(self.d + value)

    def _norm(self, order: NormOrder) -> float:
        d = self.d.double()
        if order == "spectral":
            return float(d.abs().max()) if len(d) else 0.0
        return float(d.norm() if order == "fro" else d.sum())

    def inverse(self) -> Diagonal:
        """Return the entrywise reciprocal."""
        self._require_positive()
        return Diagonal(1 / self.d)

    def _solve(self, v: Tensor) -> Tensor:
        self._require_positive()
        return v / self.d[:, None]

    def _inverse_root(self, z: Tensor) -> Tensor:
        self._require_positive()
        return z / self.d.sqrt()[:, None]

    def log_determinant(self) -> float:
        """Sum of the entries' logarithms."""
        self._require_positive()
        return float(self.d.double().log().sum())

    def _require_positive(self) -> None:
        # Reciprocals of single entries lose nothing however small they are, so only zero is too small.
        require_positive(self.d, "the diagonal matrix", len(self.d))


class Identity(Symmetric):
    """A multiple of the identity.

    Args:
        size: rows and columns.
        scale: the multiple.
        dtype: precision of its products.
        device: where its products live.
    """

    def __init__(
        self,
        size: int,
        scale: float | Tensor = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Keep the multiple as a 0-d tensor."""
        if isinstance(scale, Tensor) and scale.ndim:
            raise ValueError("Identity takes one number as its scale; use Diagonal for one per entry.")
        if not isinstance(scale, Tensor):
            dtype = torch.get_default_dtype() if dtype is None else dtype
        elif device is None:
            device = scale.device  # not torch's default device
        self.size = size
        self.factor = torch.as_tensor(scale, dtype=dtype, device=device)
        self.shape, self.tensors = (size, size), (self.factor,)

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes again."""
        return {"size": self.size, "scale": self.factor}

    def _matmul(self, v: Tensor) -> Tensor:
        return v * self.factor

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return torch.diag(self.diagonal())

    def diagonal(self) -> Tensor:
        """Return the multiple, once per row."""
        return self.factor.repeat(self.size)

    def scale(self, factor: float) -> Identity:
        """Multiply by a number."""
        return Identity(self.size, self.factor * factor)

    def shifted(self, value: float) -> Identity:
        """Add a multiple of the identity."""
        return Identity(self.size, self.factor + value)

    def _norm(self, order: NormOrder) -> float:
        factor = float(self.factor)
        if order == "trace":
            return factor * self.size
        return abs(factor) * (self.size**0.5 if order == "fro" else min(self.size, 1))

    def inverse(self) -> Identity:
        """Return the reciprocal multiple."""
        return Identity(self.size, 1 / self._positive())

    def _solve(self, v: Tensor) -> Tensor:
        return v / self._positive()

    def _inverse_root(self, z: Tensor) -> Tensor:
        return z / self._positive().sqrt()

    def log_determinant(self) -> float:
        """The multiple's logarithm, once per row."""
        return self.size * float(self._positive().double().log())

    def _positive(self) -> Tensor:
        require_positive(self.factor, "the multiple of the identity", self.size)
        return self.factor


class Zero(Operator):
    """The zero matrix, of any shape.

    Args:
        rows: number of rows.
        cols: number of columns.
        dtype: precision of its products.
        device: where its products live.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Keep the shape; an empty tensor holds dtype and device."""
        self._empty = torch.empty(0, dtype=dtype, device=device)
        self.shape, self.tensors = (rows, cols), (self._empty,)

    def arguments(self) -> dict[str, Any]:
        """What its constructor takes again."""
        return {"rows": self.shape[0], "cols": self.shape[1], "dtype": self.dtype, "device": self.device}

    @property
    def T(self) -> Zero:
        """The transpose."""
        return Zero(self.shape[1], self.shape[0], self.dtype, self.device)

    def _matmul(self, v: Tensor) -> Tensor:
        return v.new_zeros(self.shape[0], v.shape[1])

    def to_dense(self) -> Tensor:
        """Return the matrix."""
        return self._empty.new_zeros(self.shape)

    def diagonal(self) -> Tensor:
        """Return zeros."""
        self.require_square("diagonal")
        return self._empty.new_zeros(self.shape[0])

    def scale(self, factor: float) -> Zero:
        """Multiply by a number: itself."""
        return self

    def shifted(self, value: float) -> Identity:
        """Add a multiple of the identity."""
        self.require_square("shifting")
        return Identity(self.shape[0], value, self.dtype, self.device)

    def _norm(self, order: NormOrder) -> float:
        return 0.0

    def inverse(self) -> NoReturn:
        """Raise: zero has no inverse."""
        self.require_square("inverse")
        raise SingularMatrixError("the zero matrix", self.shape[0], 0.0, sufficient_damping(0.0, 1.0, self.dtype))

    def log_determinant(self) -> NoReturn:
        """Raise: zero has no inverse."""
        self.inverse()

    def _solve(self, v: Tensor) -> NoReturn:
        self.inverse()

    def _inverse_root(self, z: Tensor) -> NoReturn:
        self.inverse()
