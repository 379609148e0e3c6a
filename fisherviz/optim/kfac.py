"""KFAC, complete (Martens & Grosse 2015, sections 5 to 9) or plain, with fixed damping.

Complete: proposals of the factored approximation are re-scaled by the exact F on the mini-batch, with momentum from a
2 × 2 system, λ by Levenberg–Marquardt and γ by greedy search (`adaptive`). Plain: what Benzing (2021) compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fisherviz.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.likelihoods import Likelihood
from fisherviz.optim.natural_gradient import NaturalGradient

METHODS = {"block-diagonal": "kfac", "block-tridiagonal": "kfac-tridiagonal"}


class PlainKFAC(NaturalGradient):
    """KFAC with fixed damping and a fixed learning rate; use it as `KFAC(..., rescale=False, adapt=False)`.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        inverse: "block-diagonal" or "block-tridiagonal".
        heuristic_damping: True: factored Tikhonov with γ = √λ (section 6.3); False: λ added to the eigenvalues.
        setting: "expand" or "reduce", of the factors under weight sharing.
        **options: as for `NaturalGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        inverse: str = "block-diagonal",
        heuristic_damping: bool = True,
        setting: str | None = None,
        **options: Any,
    ) -> None:
        if inverse not in METHODS:
            raise ValueError(f"inverse must be one of {', '.join(METHODS)}, got {inverse!r}.")
        if inverse == "block-tridiagonal" and not heuristic_damping:
            raise ValueError(
                "the block-tridiagonal inverse takes factored damping only; leave heuristic_damping=True."
            )
        self.heuristic_damping = heuristic_damping
        own = {} if setting is None else {"setting": setting}
        super().__init__(model, likelihood, METHODS[inverse], ramp=True, **options, **own)

    def _rule(self, damping: float | Damping) -> Tikhonov | FactoredTikhonov | None:
        rule = as_damping(damping)
        if self.heuristic_damping and isinstance(rule, Tikhonov):
            return FactoredTikhonov(math.sqrt(rule.value)) if rule.value else None
        return rule


class KFAC(PlainKFAC):
    """KFAC with fixed damping."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        inverse: str = "block-diagonal",
        params: Iterable[Any] | None = None,
        lr: float = 1.0,
        damping: float = 150.0,
        momentum: float | None = None,
        weight_decay: float | None = None,
        T: int | None = None,
        decay: float = 0.95,
        kind: str = "mc",
        samples: int = 1,
        rescale: bool = True,
        adapt: bool = True,
        heuristic_damping: bool = True,
        setting: str | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if rescale or adapt:
            raise NotImplementedError(
                "the adaptive parts are not there yet; pass rescale=False, adapt=False."
            )
        super().__init__(
            model, likelihood, inverse=inverse, heuristic_damping=heuristic_damping, setting=setting, params=params,
            lr=lr, damping=damping, momentum=momentum or 0.0, weight_decay=weight_decay or 0.0, T=T or 1, decay=decay,
            kind=kind, samples=samples, output=output,
        )  # fmt: skip
