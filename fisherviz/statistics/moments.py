"""The statistics that approximations and optimizers name: factors, unit blocks, diagonals, exact blocks.

Factors as in Martens & Grosse 2015, eq. 1, and Grosse & Martens 2016; unit blocks as in Sang et al. 2022. What they
have in common is in `base`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fisherviz.capture.captures import AnyCapture, Capture, StructuredCapture, TiedCapture
from fisherviz.capture.formed import FormedCapture
from fisherviz.capture.tokens import TokenCapture
from fisherviz.statistics.base import RowsStatistic, Setting, Statistic
from fisherviz.statistics.gradients import pieces
from fisherviz.statistics.products import block, gram, weighted_moments, working

Use = Literal["read", "used"]


class _Factor(RowsStatistic):
    """A second moment of rows of one layer, or of one use of it.

    Args:
        layer: its name.
        setting: how positions are taken together.
        use: "read" as a table or "used" as a weight, of a layer that is both.
    """

    def __init__(self, layer: str, setting: Setting = "expand", use: Use | None = None) -> None:
        super().__init__(layer, setting)
        self.use = use

    @property
    def key(self) -> Hashable:
        """Of one use, where a weight has two."""
        return (super().key, self.use) if self.use else super().key

    def _of_use(self, capture: AnyCapture) -> AnyCapture:
        return getattr(capture, self.use) if self.use and isinstance(capture, TiedCapture) else capture


class InputFactor(_Factor):
    """Second moment of a layer's inputs, (da, da), or (groups, da, da); of one-hot inputs its diagonal (da,).

    Settings: "expand" averages over positions, 1/T Σ_t ā_t ā_tᵀ; "reduce" takes the outer product of mean_t ā_t;
    "sum" adds over positions (FOOF). One-hot inputs are expanded where others are reduced.
    """

    needs_gradients = False

    def diagonal(self, capture: AnyCapture) -> Tensor | None:
        """How often each token is read."""
        capture = self._of_use(capture)
        if not isinstance(capture, TokenCapture):
            return None
        shares = _shares(capture, self.setting)
        scale = 1 if self.setting == "sum" or shares is not None else capture.positions
        return capture.counts(shares) / scale

    def values(self, capture: AnyCapture) -> tuple[Tensor, bool, float]:
        """Inputs, 1/T for "expand"."""
        capture = _structured(self._of_use(capture), self)
        a, weight = _inputs(capture, self.setting)
        return a, capture.grouped, weight


class OutputFactor(_Factor):
    """Second moment of a layer's pseudo-gradients, (dg, dg), or (groups, dg, dg).

    Settings: "expand" adds outer products over positions, Σ_t g_t g_tᵀ; "reduce" takes that of Σ_t g_t. Those behind
    one-hot inputs are expanded in either case, where something is read.
    """

    def values(self, capture: AnyCapture) -> tuple[Tensor, bool, float]:
        """Pseudo-gradients of all vectors."""
        capture = self._of_use(capture)
        if isinstance(capture, TokenCapture):
            return capture.g[:, capture.weights != 0], False, 1.0
        capture = _structured(capture, self)
        g = capture.g.sum(2, keepdim=True) if self.setting == "reduce" else capture.g
        return g, capture.grouped, 1.0


class OutputSquares(Statistic):
    """The diagonal of a weight's second moment of pseudo-gradients (dg,), of a layer that is a table too.

    Positions are expanded; the moment itself would be vocabulary × vocabulary.
    """

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch, its positions and vectors."""
        capture = captures[0]
        assert isinstance(capture, TiedCapture)
        return capture.used.g.square().sum((0, 1, 2))


class _CrossFactor(Statistic):
    """Cross moment of two layers' rows."""

    def __init__(self, row: str, col: str, setting: Setting = "expand") -> None:
        super().__init__(row, col, setting=setting)

    @abstractmethod
    def rows(self, capture: Capture) -> tuple[Tensor, float]:
        """Rows (..., d), and the number that their product is multiplied by."""

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        row, col = (_structured(c, self) for c in captures)
        if self.setting != "reduce":
            _check_aligned(row, col, self)
        (x, weight), (y, other) = self.rows(row), self.rows(col)
        weight = weight if weight == other else (weight * other) ** 0.5
        return (x.flatten(0, -2).T @ y.flatten(0, -2)).mul_(weight)


class CrossInputFactor(_CrossFactor):
    """Cross moment of two layers' inputs, (da_row, da_col)."""

    needs_gradients = False

    def rows(self, capture: Capture) -> tuple[Tensor, float]:
        """Inputs."""
        return _inputs(capture, self.setting)


class CrossOutputFactor(_CrossFactor):
    """Cross moment of two layers' pseudo-gradients, (dg_row, dg_col)."""

    def rows(self, capture: Capture) -> tuple[Tensor, float]:
        """Pseudo-gradients of all vectors."""
        return capture.g.sum(2) if self.setting == "reduce" else capture.g, 1.0


class UnitBlocks(Statistic):
    """Blocks of each output unit's weights with its bias, (d_out, da, da): E[g_o² ā āᵀ] where T = 1."""

    needs_rows, forms = False, True

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        capture = captures[0]
        if isinstance(capture, TokenCapture | TiedCapture | FormedCapture):
            return self._summed(capture)
        capture = _structured(capture, self)
        if capture.factored:
            capture = capture.to(working(capture.g))
            return weighted_moments(capture.a[:, 0], capture.g[:, :, 0].square().sum(0))
        return self._summed(capture)

    def _summed(self, capture: StructuredCapture | FormedCapture) -> Tensor:
        """From the gradients of as many examples at a time as fit."""
        total: Tensor | None = None
        for start, stop in pieces(capture):
            gradients = capture.select(start, stop).gradients.unflatten(2, (-1, capture.width))
            total = gram(gradients.flatten(0, 1).transpose(0, 1), total)  # of (d_out, K N, da)
        assert total is not None
        return total


class Diagonal(Statistic):
    """Second moment of each entry of the gradient, (P,) in unit order."""

    needs_rows, forms = False, True

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        return captures[0].square_sum()


class Block(Statistic):
    """Exact Fisher block between two layers, (P_row, P_col) in unit order."""

    needs_rows, forms = False, True

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        return block(captures[0], captures[-1])


class EigenMoment(Statistic):
    """Second moment of the gradient in a Kronecker eigenbasis, (dg, da), or (groups, dg, da) (EKFAC).

    Args:
        layer: its name.
        qa: eigenvectors of A; None: the identity, for one-hot inputs.
        qg: eigenvectors of G.
    """

    lasting, needs_rows, forms = False, False, True

    def __init__(self, layer: str, qa: Tensor | None, qg: Tensor) -> None:
        super().__init__(layer)
        self.qa, self.qg = qa, qg

    @property
    def key(self) -> Hashable:
        """Unique to this pair of bases."""
        return ("EigenMoment", *self.layers, id(self.qa), id(self.qg))

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        capture = captures[0]
        if isinstance(capture, TokenCapture):
            turned = replace(capture.to(self.qg.dtype), g=capture.g.to(self.qg.dtype) @ self.qg)
            return turned.square_sum().view(-1, capture.vocabulary)
        if isinstance(capture, TiedCapture):
            return capture.to(self.qg.dtype).turned(self.qg).square_sum().view(len(self.qg), -1)
        assert self.qa is not None
        if isinstance(capture, FormedCapture):
            return self._of_gradients(capture)
        capture = _structured(capture, self)
        capture = Capture(capture.a.to(self.qa.dtype), capture.g.to(self.qg.dtype))
        if capture.grouped:
            a = torch.einsum("nthi,hij->nthj", capture.a, self.qa)
            shown = Capture(a, torch.einsum("knthi,hij->knthj", capture.g, self.qg))
        else:
            shown = Capture(capture.a @ self.qa, capture.g @ self.qg)
        if shown.factored:
            weights = shown.g[:, :, 0].square().sum(0)
            return weights.T @ shown.a[:, 0].square()
        shape = (*self.qg.shape[:-1], self.qa.shape[-1])
        return shown.square_sum().reshape(shape)

    def _of_gradients(self, capture: FormedCapture) -> Tensor:
        """From the gradients themselves, of as many examples at a time as fit."""
        qa, qg = self.qa, self.qg
        assert qa is not None
        total = qg.new_zeros(*qg.shape[:-1], qa.shape[-1])
        for start, stop in pieces(capture):
            rows = capture.select(start, stop).rows.to(qg.dtype)
            total += (qg.mT @ rows.unflatten(1, total.shape) @ qa).square_().sum(0)
        return total


class GradientSum(Statistic):
    """Sum of the gradient over examples and vectors, (P,) in unit order."""

    needs_rows = False

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        return captures[0].sum()

    def spared(self, kept: FormedCapture) -> int:
        """Of one vector: pseudo-gradients are summed before."""
        return kept.operations // kept.vectors


def _structured(capture: AnyCapture, statistic: Statistic) -> Capture:
    if not isinstance(capture, Capture):
        raise NotImplementedError(
            f"layer {statistic.layers[0]!r} has no inputs and pseudo-gradients (generic path), which "
            f"{type(statistic).__name__} needs; use its exact block or diagonal."
        )
    return capture


def _inputs(capture: Capture, setting: Setting | None) -> tuple[Tensor, float]:
    """Inputs (N, T, ...) or (N, 1, ...) and the number that their products are multiplied by; T is an example's own."""
    a, shares = capture.a, _shares(capture, setting)
    if shares is None:
        weight = 1 / capture.positions if setting == "expand" else 1.0
        return a.mean(1, keepdim=True) if setting == "reduce" else a, weight
    a = a * (shares if setting == "reduce" else shares.sqrt()).view(*shares.shape, *[1] * (a.dim() - 2))
    return a.sum(1, keepdim=True) if setting == "reduce" else a, 1.0


def _shares(capture: Capture | TokenCapture, setting: Setting | None) -> Tensor | None:
    """What each position (N, T) is of the average over those of its example that count, or 1 in a sum; None: all do."""
    if capture.counted is None:
        return None
    there = capture.counted.to(capture.g.dtype)
    return there if setting == "sum" else there / there.sum(1, keepdim=True).clamp(min=1)


def _check_aligned(row: Capture, col: Capture, statistic: Statistic) -> None:
    if row.grouped or col.grouped or row.positions != col.positions:
        raise ValueError(
            f"layers {statistic.layers[0]!r} and {statistic.layers[1]!r} share weights over different positions "
            f"({row.positions} and {col.positions}) or in groups; "
            "their cross factor needs setting='reduce' without groups."
        )
