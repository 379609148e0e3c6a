"""Unit blocks as an operator that never forms them all: CW-NGD of one batch, and of wide layers (Sang et al. 2022).

Unit o's block is s V_oᵀ V_o + shift I with few rows V_o (R, da). It is solved for by conjugate gradients where their
products cost less than a factorisation, and else over the fan-in or over the rows, whichever costs less; units are
taken as many at a time as fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherviz.capture.captures import Capture, StructuredCapture
from fisherviz.capture.formed import FormedCapture
from fisherviz.operators import UnitBlocks
from fisherviz.operators.base import NormOrder, Symmetric
from fisherviz.operators.factorise import eigenvalues, trusted_cholesky
from fisherviz.operators.lanczos import NotSolvedError, cg
from fisherviz.operators.triangular import log_determinant_of, solve_columns
from fisherviz.statistics import UnitBlocks as UnitBlocksStatistic
from fisherviz.statistics.examples import root_correction
from fisherviz.statistics.products import gram, weighted_moments_square_norm
from fisherviz.support import timing
from fisherviz.support.memory import require_dense

FAR = 100.0
"""How many times a block's rounding must fit into the damping: a solve's relative error is at most the reciprocal."""
CLOSE = 1e-11
"""Error of a solve by conjugate gradients, relative to the solution, where a unit of rounding is less than that."""
LEAST_PRODUCTS = 30
"""Conjugate gradients are not tried where fewer products than that cost as much as half of a factorisation."""
_GRAM = "the examples' Gram matrix of unit"
_ENTRIES = 2**24
"""Entries of unit blocks, or of their rows, that are formed at once."""


class ExampleUnits(Symmetric):
    """Unit blocks s V_oᵀ V_o + shift I of one layer.

    Beside a sum over a batch a small damping drowns in float32's rounding, so that solves work in float64 wherever
    that comes near the damping.

    Args:
        capture: inputs and pseudo-gradients of the layer, or its per-example gradients.
        factor: s.
        shift: damping that has been added.
    """

    def __init__(self, capture: StructuredCapture | FormedCapture, factor: float, shift: float = 0.0) -> None:
        self.capture, self.factor, self.shift = capture, factor, shift
        self.shape, self.tensors = (capture.size, capture.size), capture.tensors
        self.width = capture.width
        """da."""
        self.units = capture.size // self.width
        self.rows = capture.examples if capture.factored else capture.examples * capture.vectors
        """R: of a single outer product per example and vector, the vectors' sum up in one row."""

    # ---- some units at a time ------------------------------------------------------------------------------------

    def _part(self, start: int, stop: int) -> ExampleUnits:
        """Units start..stop; of a grouped convolution, whole groups."""
        return ExampleUnits(self.capture.units(start, stop), self.factor, self.shift)

    def _parts(self, entries: int) -> Iterator[tuple[slice, ExampleUnits]]:
        """All units, as many at a time as fit with so many entries each."""
        capture = self.capture
        least = capture.g.shape[-1] if isinstance(capture, Capture) and capture.grouped else 1
        step = max(1, _ENTRIES // (entries * least)) * least
        for start in range(0, self.units, step):
            stop = min(start + step, self.units)
            yield slice(start, stop), self if stop - start == self.units else self._part(start, stop)

    def _v(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | Tensor:
        """A (R, da) and r (R, units) where V_o is r_o ∘ a; V (units, R, da) otherwise."""
        c = self.capture.to(dtype)
        if isinstance(c, Capture) and c.factored:
            return c.a[:, 0], c.g[:, :, 0].square().sum(0).sqrt_()
        return c.gradients.unflatten(2, (-1, self.width)).flatten(0, 1).transpose(0, 1)

    @property
    def _gradient_entries(self) -> int:
        """Of a unit's V_o, where it is formed."""
        return 1 if self.capture.factored else self.rows * self.width

    def blocks(self) -> UnitBlocks:
        """The same matrix with its blocks written down."""
        B = UnitBlocksStatistic("").contribution(self.capture)
        if self.factor != 1.0:
            B.mul_(self.factor)
        return UnitBlocks(B, self.shift)

    # ---- the operator --------------------------------------------------------------------------------------------

    def _matmul(self, v: Tensor) -> Tensor:
        columns = v.view(self.units, self.width, -1)
        out = torch.empty_like(columns)
        for units, part in self._parts(self._gradient_entries):
            rows = part._v(torch.float64)
            out[units] = _back(rows, _times(rows, columns[units].double())).mul_(self.factor)
        return out.reshape(v.shape) + self.shift * v

    @property
    def _fewer_rows(self) -> bool:
        """Whether blocks are solved for over the rows: in float64, where blocks themselves often do with float32."""
        return 2 * self.rows**3 < self.width**3 and self.shift > 0

    def _factorised_parts(self) -> Iterator[tuple[slice, ExampleUnits]]:
        """All units, as many at a time as fit with what is factorised of them."""
        entries = max(self.rows**2, self._gradient_entries) if self._fewer_rows else self.width**2
        return self._parts(entries)

    def log_determinant(self) -> float:
        """Sum of the blocks', over the rows by Sylvester's identity."""
        parts = (part for _, part in self._factorised_parts())
        if not self._fewer_rows:
            return sum(part._over_width.log_determinant() for part in parts)
        rest = (self.width - self.rows) * math.log(self.shift) + self.rows * math.log(self.factor)
        return self.units * rest + sum(log_determinant_of(part._over_rows) for part in parts)

    @timing.part("inversion")
    def _solve(self, v: Tensor) -> Tensor:
        columns = v.reshape(self.units, self.width, -1)
        if (found := self._by_products(columns)) is not None:
            return found.reshape(v.shape)
        out = torch.empty_like(columns)
        for units, part in self._factorised_parts():
            right = columns[units]
            if self._fewer_rows:
                rows, right = part._v(torch.float64), right.double()
                w = solve_columns(part._over_rows, _times(rows, right))
                out[units] = ((right - _back(rows, w)) / self.shift).to(v.dtype)
            else:
                solved = part._over_width.solve(right.reshape(-1, right.shape[2]).to(part._over_width.dtype))
                out[units] = solved.view(right.shape).to(v.dtype)
        return out.reshape(v.shape)

    def _by_products(self, columns: Tensor) -> Tensor | None:
        """Solutions (units, da, k) by conjugate gradients in float64, each unit by itself, as exact as v's precision.

        None where a factorisation is there or costs less, or where half of its cost was not enough.
        """
        size, other = (self.rows, self.width) if self._fewer_rows else (self.width, self.rows)
        most = int((other * size**2 + size**3 / 3) / (4 * self.rows * self.width * columns.shape[2]))
        if most < LEAST_PRODUCTS or self.shift <= 0 or {"_over_rows", "_over_width"} & vars(self).keys():
            return None
        # ‖x - y‖ ≤ ‖r‖ / shift and ‖x‖ ≥ ‖v‖ / ‖block‖: the residual that an error takes
        norm = float(self.diagonal().double().reshape(-1, self.width).sum(1).max())
        tol = max(CLOSE, torch.finfo(columns.dtype).eps) * self.shift / norm
        out = torch.empty_like(columns)
        for units, part in self._parts(max(self._gradient_entries, (self.rows + self.width) * columns.shape[2])):
            rows, given = part._v(torch.float64), columns[units].double()

            def product(x: Tensor, rows: Any = rows, like: Tensor = given) -> Tensor:
                own = _by_unit(x, like)
                return _by_column(_back(rows, _times(rows, own)).mul_(self.factor).add_(own, alpha=self.shift))

            try:
                solved = cg(product, _by_column(given), tol, most)
            except NotSolvedError:
                return None
            out[units] = _by_unit(solved, given).to(out.dtype)
        return out

    def _inverse_root(self, z: Tensor) -> Tensor:
        columns = z.reshape(self.units, self.width, -1)
        out = torch.empty_like(columns)
        for units, part in self._factorised_parts():
            given = columns[units]
            if self._fewer_rows:
                rows, given = part._v(torch.float64), given.double()
                W = root_correction(_row_products(rows), self.factor, self.shift, _GRAM)
                out[units] = (given / self.shift**0.5 + _back(rows, W @ _times(rows, given))).to(z.dtype)
            else:
                root = part._over_width.inverse_root(given.reshape(-1, given.shape[2]).to(part._over_width.dtype))
                out[units] = root.view(given.shape).to(z.dtype)
        return out.reshape(z.shape)

    @cached_property
    def _over_rows(self) -> Tensor:
        """Cholesky factors of V_o V_oᵀ + shift/s I, (units, R, R), in float64."""
        products = _row_products(self._v(torch.float64))
        return trusted_cholesky(products, _GRAM, shift=self.shift / self.factor)

    @cached_property
    def _over_width(self) -> UnitBlocks:
        """The blocks, in float64 unless float32 rounds them far below the damping."""
        # a block's norm is at least its trace over √da, which costs no block
        made = None
        if self._rounds_far_below(self.diagonal().reshape(-1, self.width).sum(1) / self.width**0.5):
            made = self.blocks()
        if made is None or not self._rounds_far_below(torch.linalg.vector_norm(made.tensors[0], dim=(1, 2))):
            made = ExampleUnits(self.capture.to(torch.float64), self.factor, self.shift).blocks()
        return made.trust() if self.shift > 0 else made

    def _rounds_far_below(self, norms: Tensor) -> bool:
        """Whether blocks of these norms can be trusted in their own precision; in float64 there is no better one."""
        if norms.dtype == torch.float64:
            return True
        return bool((FAR * torch.finfo(norms.dtype).eps * norms < self.shift).all())

    def to_dense(self) -> Tensor:
        """The matrix; MemoryError where it is too large."""
        require_dense(*self.shape, "the dense matrix of unit blocks", self.tensors[0])
        return self.blocks().to_dense()

    def diagonal(self) -> Tensor:
        """Its diagonal."""
        return self.capture.square_sum() * self.factor + self.shift

    def scale(self, factor: float) -> ExampleUnits:
        """Times a number."""
        return ExampleUnits(self.capture, self.factor * factor, self.shift * factor)

    def shifted(self, value: float) -> ExampleUnits:
        """Plus a multiple of the identity."""
        return ExampleUnits(self.capture, self.factor, self.shift + value)

    def _norm(self, order: NormOrder) -> float:
        trace = self.factor * float(self.capture.square_sum().sum(dtype=torch.float64))
        if order == "trace":
            return trace + self.shift * self.shape[0]
        if order == "spectral":
            parts = self._parts(max(min(self.rows, self.width) ** 2, self._gradient_entries))
            return self.factor * max(float(part._smaller().max()) for _, part in parts) + self.shift
        plain = self.factor**2 * self.square_sum()
        return (plain + 2 * self.shift * trace + self.shift**2 * self.shape[0]) ** 0.5

    def square_sum(self) -> float:
        """Σ_o ‖V_oᵀ V_o‖²."""
        if self.capture.factored:
            c = self.capture
            assert isinstance(c, Capture)
            return weighted_moments_square_norm(c.a[:, 0], c.g[:, :, 0].double().square().sum(0))
        parts = self._parts(max(min(self.rows, self.width) ** 2, self._gradient_entries))
        return sum(float(part._products().double().square().sum()) for _, part in parts)

    def _products(self) -> Tensor:
        """V_oᵀ V_o or V_o V_oᵀ, whichever is smaller: they have the same norm and spectrum."""
        if self.rows >= self.width:
            return UnitBlocksStatistic("").contribution(self.capture)
        return _row_products(self._v(self.dtype))

    def _smaller(self) -> Tensor:
        return eigenvalues(self._products())

    def inverse(self) -> UnitBlocks:
        """The inverse of all blocks, formed; MemoryError where they do not fit."""
        require_dense(self.shape[0], self.width, "the inverse of all unit blocks", self.tensors[0])
        return self.blocks().inverse()


def _times(rows: tuple[Tensor, Tensor] | Tensor, v: Tensor) -> Tensor:
    """V_o v_o: (units, R, k) from (units, da, k)."""
    if isinstance(rows, Tensor):
        return rows @ v
    a, r = rows
    return _by_unit(a @ _by_column(v), v) * r.mT.unsqueeze(2)


def _back(rows: tuple[Tensor, Tensor] | Tensor, w: Tensor) -> Tensor:
    """V_oᵀ w_o: (units, da, k) from (units, R, k)."""
    if isinstance(rows, Tensor):
        return rows.mT @ w
    a, r = rows
    return _by_unit(a.mT @ _by_column(w * r.mT.unsqueeze(2)), w)


def _by_column(v: Tensor) -> Tensor:
    """(units, da, k) as columns (da, units k), one for each unit and vector."""
    return v.transpose(0, 1).flatten(1)


def _by_unit(columns: Tensor, like: Tensor) -> Tensor:
    """Columns as (units, da, k) again."""
    return columns.unflatten(1, (like.shape[0], like.shape[2])).transpose(0, 1)


def _row_products(rows: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    """V_o V_oᵀ: (units, R, R)."""
    if isinstance(rows, Tensor):
        return gram(rows.mT)
    a, r = rows
    return gram(a.mT) * (r.mT.unsqueeze(2) * r.mT.unsqueeze(1))
