"""Two approximations that only optimizers use: the dense exact Fisher, and unit blocks of one batch.

`ExactFisher` couples all layers (small networks). `BatchUnits` is CW-NGD's algorithm 1 (Sang et al. 2022); its
blocks stay unformed until the damping is known, which decides the precision that they need (`UnitExamples`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisherviz.approximations import CWNGD as UnitApproximation
from fisherviz.approximations import Approximation, Values
from fisherviz.approximations.base import Couplings
from fisherviz.approximations.matrices import LayeredMatrix, full_matrix
from fisherviz.capture.captures import Capture
from fisherviz.network.layers import Layer
from fisherviz.network.space import ParameterSpace
from fisherviz.operators import Dense, Operator, UnitBlocks
from fisherviz.operators.base import NormOrder, Symmetric
from fisherviz.operators.factorise import trusted_cholesky
from fisherviz.statistics import Block, Statistic
from fisherviz.statistics import UnitBlocks as UnitBlocksStatistic
from fisherviz.support import timing

DENSE_PARAMETERS = 6000
FAR = 100.0
"""How many times a block's rounding must fit into the damping: a solve's relative error is at most the reciprocal."""


class ExactFisher(Approximation):
    """The exact Fisher of all layers together, dense."""

    name = "exact"
    handles_generic = True

    def prepare(self, layers: Sequence[Layer], positions: Mapping[str, int]) -> None:
        """Refuse networks whose Fisher is better not written down."""
        size = sum(layer.size for layer in layers)
        if size > DENSE_PARAMETERS:
            raise MemoryError(
                f"the dense Fisher of {size:,} parameters takes a {size:,} x {size:,} Cholesky "
                f"factorisation every step; "
                "use SubsampledNaturalGradient, which works in the space of the examples."
            )

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """The layer's own block."""
        return {"block": Block(layer.name, layer.name)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """F_ii."""
        return Dense(values["block"])

    def pairs(self, layers: Sequence[Layer], adjacent: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
        """Every pair."""
        return list(itertools.combinations(range(len(layers)), 2))

    def pair_statistics(self, row: Layer, col: Layer) -> dict[str, Statistic]:
        """F_ij."""
        return {"block": Block(row.name, col.name)}

    def assemble(self, space: ParameterSpace, operators: Sequence[Operator], couplings: Couplings) -> LayeredMatrix:
        """F."""
        return full_matrix(space, operators, {pair: Dense(v["block"]) for pair, v in couplings.items()})


class BatchUnits(UnitApproximation):
    """CW-NGD's unit blocks of one batch, over fan-in or over examples."""

    name = "cw-ngd"

    def wants_capture(self, layer: Layer) -> bool:
        """The space is chosen from the capture's size."""
        return layer.structured

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """None beside the capture."""
        return {}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """E[g_o² ā āᵀ] for each unit o."""
        capture = values["capture"]
        return UnitExamples(capture, 1.0 / capture.examples)


class UnitExamples(Symmetric):
    """Unit blocks s V_oᵀ V_o + shift I known by V_o (R, da), one row per example and vector.

    Solved over the fan-in da or over the R examples, whichever is smaller. Beside a sum over a batch a small damping
    drowns in float32's rounding, so that solves work in float64 wherever that comes near the damping.

    Args:
        capture: inputs and pseudo-gradients of one layer.
        factor: s.
        shift: damping that has been added.
    """

    def __init__(self, capture: Capture, factor: float, shift: float = 0.0) -> None:
        self.capture, self.factor, self.shift = capture, factor, shift
        self.shape, self.tensors = (capture.size, capture.size), capture.tensors

    @property
    def doubled(self) -> UnitExamples:
        """The same operator in float64."""
        c = self.capture
        return UnitExamples(Capture(c.a.double(), c.g.double()), self.factor, self.shift)

    def _rows(self) -> tuple[Tensor, Tensor] | Tensor:
        """A (R, da) and g (R, d_out) where V_o is g_o ∘ a; V (d_out, R, da) otherwise. In float64."""
        c = self.doubled.capture
        if c.factored:
            return c.a[:, 0].repeat(c.vectors, 1), c.g[:, :, 0].flatten(0, 1)
        return c.gradients.unflatten(2, (-1, c.a.shape[-1])).flatten(0, 1).transpose(0, 1)

    def _times(self, rows: tuple[Tensor, Tensor] | Tensor, v: Tensor) -> Tensor:
        """V_o v_o: (d_out, R) from (d_out, da)."""
        if isinstance(rows, tuple):
            return (rows[0] @ v.mT * rows[1]).mT
        return (rows @ v.unsqueeze(2)).squeeze(2)

    def _back(self, rows: tuple[Tensor, Tensor] | Tensor, w: Tensor) -> Tensor:
        """V_oᵀ w_o: (d_out, da) from (d_out, R)."""
        if isinstance(rows, tuple):
            return (rows[1].mT * w) @ rows[0]
        return (w.unsqueeze(1) @ rows).squeeze(1)

    def _gram(self, rows: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """V_o V_oᵀ: (d_out, R, R)."""
        if isinstance(rows, tuple):
            a, g = rows
            return (a @ a.mT) * (g.mT.unsqueeze(2) * g.mT.unsqueeze(1))
        return rows @ rows.mT

    def _matmul(self, v: Tensor) -> Tensor:
        rows, da = self._rows(), self.capture.a.shape[-1]
        columns = [
            self._back(rows, self._times(rows, column.reshape(-1, da).double())).reshape(-1) for column in v.unbind(1)
        ]
        return (self.factor * torch.stack(columns, 1)).to(v.dtype) + self.shift * v

    @timing.part("inversion")
    def _solve(self, v: Tensor) -> Tensor:
        c = self.capture
        if c.examples * c.vectors >= c.a.shape[-1] or self.shift <= 0:
            return self._over_fan_in._solve(v.to(self._over_fan_in.dtype)).to(v.dtype)
        rows, da = self._rows(), c.a.shape[-1]
        columns = []
        for column in v.unbind(1):
            u = column.reshape(-1, da).double()
            w = torch.cholesky_solve(self._times(rows, u).unsqueeze(2), self._over_examples).squeeze(2)
            columns.append(((u - self._back(rows, w)) / self.shift).reshape(-1))
        return torch.stack(columns, 1).to(v.dtype)

    @cached_property
    def _over_examples(self) -> Tensor:
        """Cholesky factors of V_o V_oᵀ + shift/s I, (d_out, R, R)."""
        gram = self._gram(self._rows())
        gram.diagonal(dim1=1, dim2=2).add_(self.shift / self.factor)
        return trusted_cholesky(gram, "the examples' Gram matrix of unit")

    @cached_property
    def _over_fan_in(self) -> UnitBlocks:
        """The blocks, in float64 unless float32 rounds them far below the damping."""
        # a block's norm is at least its trace over √da, which costs no block
        da, made = self.capture.a.shape[-1], None
        if self._rounds_far_below(self.diagonal().reshape(-1, da).sum(1) / da**0.5):
            made = self.blocks()
        if made is None or not self._rounds_far_below(torch.linalg.vector_norm(made.B, dim=(1, 2))):
            made = self.doubled.blocks()
        return made.trust() if self.shift > 0 else made

    def _rounds_far_below(self, norms: Tensor) -> bool:
        """Whether blocks of these norms can be trusted in their own precision; in float64 there is no better one."""
        if norms.dtype == torch.float64:
            return True
        return bool((FAR * torch.finfo(norms.dtype).eps * norms < self.shift).all())

    def blocks(self) -> UnitBlocks:
        """The same matrix with its blocks written down."""
        B = UnitBlocksStatistic("").contribution(self.capture)
        if self.factor != 1.0:
            B.mul_(self.factor)
        B.diagonal(dim1=1, dim2=2).add_(self.shift)
        return UnitBlocks(B)

    def to_dense(self) -> Tensor:
        """The matrix."""
        return self.blocks().to_dense()

    def diagonal(self) -> Tensor:
        """Its diagonal."""
        return self.capture.square_sum() * self.factor + self.shift

    def scale(self, factor: float) -> UnitExamples:
        """Times a number."""
        return UnitExamples(self.capture, self.factor * factor, self.shift * factor)

    def shifted(self, value: float) -> UnitExamples:
        """Plus a multiple of the identity."""
        return UnitExamples(self.capture, self.factor, self.shift + value)

    def _norm(self, order: NormOrder) -> float:
        return self.blocks()._norm(order)

    def inverse(self) -> UnitBlocks:
        """The blocks' inverses."""
        return self.blocks().inverse()
