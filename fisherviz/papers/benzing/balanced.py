"""K-FAC with the damping of Benzing 2021, equation 3."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fisherviz.network.likelihoods import Likelihood
from fisherviz.operators.damping import Damping, FactoredTikhonov, as_damping
from fisherviz.optim import KFAC
from fisherviz.optim.directions import Directions, Preconditioned
from fisherviz.optim.options import NaturalGradientOptions
from fisherviz.optim.rules import StepRule


class BalancedKFAC(KFAC):
    """Plain K-FAC with λ_A λ_E = λ and λ_A / λ_E = tr(AAᵀ) / tr(EEᵀ), whatever the factors' sizes are.

    Args:
        model: the model.
        likelihood: as for `KFAC`.
        lr: learning rate.
        damping: λ.
        T: steps between inverses.
        decay: of the averages; 0: the factors are those of one mini-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        lr: float = 3e-3,
        damping: float = 0.01,
        T: int = 1,
        decay: float = 0.95,
    ) -> None:
        options: dict[str, Any] = {"rescale": False, "adapt": False, "momentum": 0.0, "kl_clip": math.inf}
        super().__init__(model, likelihood, lr=lr, damping=damping, T=T, decay=decay, **options)

    def _compose(self, options: NaturalGradientOptions, defaults: dict[str, Any]) -> tuple[Directions, StepRule[Any]]:
        return Preconditioned(balanced), super()._compose(options, defaults)[1]


def balanced(damping: float | Damping) -> FactoredTikhonov | None:
    """λ as equation 3 shares it between the factors."""
    rule = as_damping(damping)
    strength = 0.0 if rule is None else rule.strength
    return FactoredTikhonov(math.sqrt(strength), "traces") if strength else None


BALANCED = f"{__name__}:{BalancedKFAC.__name__}"
"""As `Method` names it."""
