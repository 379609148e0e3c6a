"""K-FAC with the damping of Benzing 2021, equation 3."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fisherviz.network.likelihoods import Likelihood
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.optim import KFAC


class BalancedKFAC(KFAC):
    """Plain K-FAC with λ_A λ_E = λ and λ_A / λ_E = tr(AAᵀ) / tr(EEᵀ), whatever the factors' sizes are.

    Args:
        model: the model.
        likelihood: as for `KFAC`.
        lr: learning rate.
        damping: λ.
        T: steps between inverses.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        lr: float = 3e-3,
        damping: float = 0.01,
        T: int = 1,
    ) -> None:
        options: dict[str, Any] = {"rescale": False, "adapt": False, "momentum": 0.0, "kl_clip": math.inf}
        rule = FactoredTikhonov(math.sqrt(damping), "traces")
        super().__init__(model, likelihood, lr=lr, damping=rule, T=T, **options)


BALANCED = f"{__name__}:{BalancedKFAC.__name__}"
"""As `Method` names it."""
