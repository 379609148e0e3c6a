"""Approximations without factors: the identity, and the exact diagonal."""

from __future__ import annotations

import torch

from fisherviz.approximations.base import Approximation, Values
from fisherviz.network.layers import Layer
from fisherviz.operators import Diagonal as DiagonalOperator
from fisherviz.operators import Identity as IdentityOperator
from fisherviz.operators import Operator
from fisherviz.statistics import Diagonal as DiagonalStatistic
from fisherviz.statistics import Statistic


class Identity(Approximation):
    """The identity matrix: what plain gradient descent preconditions with."""

    handles_generic = True
    follows_scale = False

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """None."""
        return {}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """I."""
        parameter = next(iter(layer.parameters.values()))
        return IdentityOperator(
            layer.size, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device
        )


class Diagonal(Approximation):
    """The exact diagonal of the Fisher; every other entry is zero."""

    handles_generic = True

    def statistics(self, layer: Layer) -> dict[str, Statistic]:
        """The second moment of each gradient entry."""
        return {"diagonal": DiagonalStatistic(layer.name)}

    def operator_for(self, layer: Layer, values: Values) -> Operator:
        """diag(E[∇²])."""
        return DiagonalOperator(values["diagonal"])
