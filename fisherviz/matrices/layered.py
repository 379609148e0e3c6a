"""The structured matrix over all probed layers: one operator on the layers' vectors, seen in any of the three orders.

What `fv.approximate` gives, and its damped and inverted forms. Vectors come in torch order; the algebra is the
operator's, in unit order, layer after layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast, overload

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fisherviz._version import __version__
from fisherviz.matrices.finite import require_finite_vector
from fisherviz.matrices.stored import Stored, encoded
from fisherviz.network.layers import LayerInfos
from fisherviz.network.space import ORDERS, Order, ParameterSpace
from fisherviz.operators import BlockMatrix, Dense, DirectSum, Operator
from fisherviz.operators.base import NormOrder
from fisherviz.operators.block_matrix import dense_from_blocks
from fisherviz.operators.damping import Damping, as_damping, damp, told_in_factors
from fisherviz.operators.finite import is_finite, require_finite
from fisherviz.operators.scipy_operator import linear_operator
from fisherviz.support import files
from fisherviz.support.choices import one_of, positive
from fisherviz.support.memory import require
from fisherviz.support.tables import counted, paragraph


class OverLayers(Protocol):
    """What a structured matrix asks of its operator beside being one."""

    def block(self, row: int, col: int) -> Operator:
        """Return the operator between two segments."""
        ...


class LayeredMatrix:
    """A symmetric matrix over the probed parameters, known by an operator.

    Flat vectors and dense matrices are in torch order unless an order is named.

    Args:
        space: the probed parameters.
        operator: the matrix in unit order, with a segment per layer (`DirectSum`, `BlockMatrix`, `Permuted`, …).
        title: what it is in a few words, for pictures and its line of text; "" names its structure.
    """

    def __init__(self, space: ParameterSpace, operator: Operator, title: str = "") -> None:
        self.space, self._whole, self._title = space, operator, title

    @property
    def title(self) -> str:
        """What the matrix is in a few words: "kfac", or "damped inverse of kfac, λ = 0.01"."""
        return self._title or type(self.whole).__name__

    @property
    def whole(self) -> Operator:
        """The matrix in unit order, with a segment per layer and `block` between two of them."""
        return self._whole

    def operator(self, i: int, j: int) -> Operator:
        """The operator between the layers at two positions, in unit order."""
        return cast(OverLayers, self.whole).block(i, j)

    def damped(self, damping: float | Damping | None) -> LayeredMatrix:
        """The matrix with damping added: a number or `Tikhonov` adds λI, `FactoredTikhonov` damps Kronecker factors.

        Blocks without Kronecker factors take λ = γ² under `FactoredTikhonov`; those between layers stay as they are.

        Raises:
            MemoryError: the damped matrix and its factors do not fit.
        """
        rule = as_damping(damping)
        if rule is not None:
            what, instead = f"{self.title}, damped and factorised,", "probe fewer layers=, or take a smaller method"
            require(2 * self.bytes, self._like.device, what, instead)
        said = self.title if rule is None else f"damped {self.title}, {rule}"
        return LayeredMatrix(self.space, damp(self.whole, rule), said)

    def scale(self, factor: float) -> LayeredMatrix:
        """The matrix times a positive number; ValueError for any other."""
        positive("factor", factor)
        return LayeredMatrix(self.space, self.whole.scale(factor), self.title)

    def inverse(self, damping: float | Damping | None = None) -> LayeredMatrix:
        """The inverse of the damped matrix, as a structured matrix of its own."""
        with told_in_factors(as_damping(damping)):
            inverse = self.damped(damping).whole.inverse()
        return LayeredMatrix(self.space, inverse, inverse_title(self.title, damping))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the matrix into one safetensors file, whole or not at all; `fv.load_approximation` reads it.

        Args:
            path: the file.

        Returns:
            The file.

        Raises:
            NotImplementedError: an operator cannot be written down, such as an inverse; save what is inverted.
            ValueError: nothing can be written there.
        """
        files.check_place(path, directory=False)
        what = {name: getattr(self, name, "") for name in ("name", "kind", "reduction")}
        what |= {name: getattr(self, "fingerprints", {}).get(name, "") for name in ("weights", "data")}
        what |= {"title": self.title, "repr": repr(self), "version": __version__}
        return files.write_whole(path, encoded(Stored(self.space, self.whole, what), self._like.dtype))

    def to_scipy(self) -> LinearOperator:
        """The matrix as scipy's `LinearOperator` (P, P) in torch order, for `eigsh`, `cg` and their like."""
        return linear_operator(self.__matmul__, self.shape[0], self._like.dtype, self._like.device)

    def norm(self, ord: str = "fro") -> float:
        """Norm "fro", "spectral" or "trace", from the structure."""
        return self.whole.norm(cast(NormOrder, ord))

    @property
    def bytes(self) -> int:
        """Memory that the operators hold."""
        return self.whole.bytes

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The layers' own operators, in unit order."""
        return tuple(self.operator(i, i) for i in range(len(self.space.layers)))

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return (self.space.size, self.space.size)

    @property
    def layers(self) -> LayerInfos:
        """What the layers are, in torch order."""
        return LayerInfos(layer.info() for layer in self.space.layers)

    @cached_property
    def _like(self) -> Tensor:
        parameter = next(iter(self.space.layers[0].parameters.values()))
        return parameter.detach().new_empty(0)

    def block(self, row: str | int, col: str | int | None = None) -> Tensor:
        """Dense block between two layers in torch order, (P_row, P_col); col None: the diagonal block.

        Raises:
            ValueError: no such layer.
            MemoryError: it does not fit.
        """
        i = self.space.position(row)
        j = i if col is None else self.space.position(col)
        names, sizes = self.space.names, self.space.sizes
        self._plan(sizes[i] * sizes[j], f"block {names[i]!r}, {names[j]!r} ({sizes[i]:,} x {sizes[j]:,})")
        return self.space.torch_block(self.operator(i, j).to_dense(), i, j)

    def to_dense(self, order: Order = "torch") -> Tensor:
        """The whole matrix (P, P) in "torch", "unit" or "input" order.

        Raises:
            ValueError: the order is unknown.
            MemoryError: it does not fit.
        """
        one_of("order", order, ORDERS)
        self._plan(self.space.size**2, f"the dense {self.shape[0]:,} x {self.shape[1]:,} matrix")
        found = dense_from_blocks(len(self.space.layers), self.operator)
        if not is_finite(found):
            for name, rows in zip(self.space.names, found.split(self.space.sizes), strict=True):
                require_finite(rows, f"layer {name!r}: {self.title}")
        return self.space.reorder_unit_dense(found, order)

    def _plan(self, entries: int, what: str) -> None:
        """An array is held in its own order, in the other, and as parts."""
        item = torch.promote_types(self._like.dtype, torch.float32).itemsize
        require(3 * entries * item, self._like.device, what, "ask for products instead, or for a smaller block")

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Product with v flat (P,) or (P, k) in torch order, or a dictionary like `named_parameters()`."""
        if isinstance(v, Mapping):
            return self.space.unflatten(self @ self.space.flatten(v))
        return self._on_columns(v, self.whole.__matmul__)

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
        with told_in_factors(as_damping(damping)):
            return self._on_columns(v, self.damped(damping).whole.solve)

    def inverse_root(self, z: Tensor, damping: float | Damping | None = None) -> Tensor:
        """S z for a square root S of the damped inverse, S Sᵀ = (M + damping)⁻¹: white noise of that covariance.

        Args:
            z: flat (P,) or (P, k) in torch order.
            damping: as for `solve`.

        Returns:
            Like z.

        Raises:
            RuntimeError: the damped matrix is singular; the message says which damping would do.
            NotImplementedError: the inverse of its structure has no such root: layers that are coupled, too large to be
                dense.
        """
        with told_in_factors(as_damping(damping)):
            return self._on_columns(z, self.damped(damping).whole.inverse_root)

    def _on_columns(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"a vector is a tensor or a dictionary name -> tensor, got {type(v).__name__}.")
        if v.is_complex():
            raise TypeError("a vector must be real, got a complex tensor; multiply its real and imaginary parts apart.")
        # operators of half-precision models are float32, like their statistics; a vector is handed back as it came
        model = self._like.dtype
        work = torch.promote_types(model, torch.float32)
        given = model if v.dtype == model else work
        if v.dim() == 2:
            self._plan(v.numel(), f"a product with {v.shape[1]:,} vectors")
        v = v.detach().to(device=self._like.device, dtype=work)
        if not is_finite(v):
            raise ValueError(f"a vector must be finite in {v.dtype}, this one holds NaN or infinite entries.")
        out = function(torch.cat(self.space.split(v)))
        found = self.space.join(out.split(self.space.sizes))
        require_finite_vector(found, self.space, f"a product with {self.title}")
        return found.to(given)

    def __repr__(self) -> str:
        return f"{self.title}: {self.shape[0]:,} x {self.shape[1]:,} over {counted(len(self.space.layers), 'layer')}"

    def _repr_html_(self) -> str:
        return paragraph(repr(self))

    def diagonal(self) -> Tensor:
        """Diagonal, flat in torch order, (P,)."""
        return self.space.join([operator.diagonal() for operator in self.operators])


def inverse_title(name: str, damping: float | Damping | None) -> str:
    """The inverse of a matrix in a few words."""
    rule = as_damping(damping)
    return f"inverse of {name}" if rule is None else f"damped inverse of {name}, {rule}"


def block_diagonal(space: ParameterSpace, operators: Sequence[Operator]) -> LayeredMatrix:
    """The matrix with one operator per layer, whose errors name the layer; everything between layers is zero."""
    return LayeredMatrix(space, DirectSum(operators, [f"layer {name!r}" for name in space.names]))


def full_matrix(
    space: ParameterSpace, operators: Sequence[Operator], couplings: Mapping[tuple[int, int], Operator]
) -> LayeredMatrix:
    """The matrix with one operator per layer, and one for each pair of layers (row, col) above the diagonal."""
    return LayeredMatrix(space, BlockMatrix({(i, i): op for i, op in enumerate(operators)} | dict(couplings)))


def dense_matrix(space: ParameterSpace, whole: Tensor, title: str = "") -> LayeredMatrix:
    """The matrix whose entries (P, P) are given in unit order."""
    parts = [row.split(space.sizes, 1) for row in whole.split(space.sizes)]
    above = {(i, j): Dense(part) for i, row in enumerate(parts) for j, part in enumerate(row) if j >= i}
    return LayeredMatrix(space, BlockMatrix(above), title)
