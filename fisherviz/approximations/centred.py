"""What centring takes the Fisher for: units that do not correlate, inputs that do so by their means alone.

K-FAC with a diagonal G and an A of rank one plus a diagonal, which Martens & Grosse 2015 (section 11) find behind the
centring of activities and derivatives (Schraudolph 1998; Raiko et al. 2012).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherviz.approximations.base import Approximation, PerFeature, Values, check_per_feature
from fisherviz.approximations.kronecker import check_kfac_setting, product
from fisherviz.capture.captures import AnyCapture
from fisherviz.network.layers import Layer
from fisherviz.operators import Operator
from fisherviz.statistics import InputFactor, OutputFactor, RowsStatistic, Setting, Statistic


class Centred(Approximation):
    """K-FAC with a diagonal G and with means and variances alone of the inputs: what centring assumes.

    A keeps its diagonal, and off it products of the inputs' means; that of an embedding is diagonal already. It is held
    as factors like K-FAC's, which makes it a method to compare with rather than a cheaper one.

    Args:
        setting: as for "kfac".
        per_feature: as for "kfac".
    """

    takes_factors = True

    def __init__(self, setting: Setting = "expand", per_feature: PerFeature = "units") -> None:
        super().__init__()
        self.setting = check_kfac_setting(setting)
        self.per_feature = check_per_feature(per_feature)

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """Mean inputs, and mean squares of inputs and pseudo-gradients."""
        return {
            "mean": _Mean(layer.name),
            "inputs": _InputSquares(layer.name, self.setting),
            "outputs": _OutputSquares(layer.name, self.setting),
        }

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """(E[ā] E[ā]ᵀ off the diagonal, E[ā²] on it) ⊗ diag(E[g²]); one-hot inputs have a diagonal A as it is."""
        m, inputs, G = values["mean"], values["inputs"], torch.diag_embed(values["outputs"])
        if layer.one_hot:
            return product(inputs, G)
        A = m.unsqueeze(-1) * m.unsqueeze(-2)
        A.diagonal(dim1=-2, dim2=-1).copy_(inputs)
        return product(A, G)


def _over_rows(statistic: RowsStatistic, capture: AnyCapture, power: int) -> Tensor:
    """Sum of the rows' powers (d,), or (groups, d), with the weight of their products."""
    rows, weight = statistic.rows(capture)
    return (rows if power == 1 else rows.square()).sum(-2) * weight


class _Mean(InputFactor):
    """Mean of the inputs over examples and positions; of tokens how often each is read."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer, "reduce")

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch of each example's mean."""
        counts = self.diagonal(captures[0])
        return _over_rows(self, captures[0], 1) if counts is None else counts


class _InputSquares(InputFactor):
    """The diagonal of `InputFactor`."""

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch."""
        counts = self.diagonal(captures[0])
        return _over_rows(self, captures[0], 2) if counts is None else counts


class _OutputSquares(OutputFactor):
    """The diagonal of `OutputFactor`."""

    def contribution(self, *captures: AnyCapture) -> Tensor:
        """Sum over the batch and its vectors."""
        return _over_rows(self, captures[0], 2)
