"""The optimizers of Sang et al. 2022, section IV: rates that decay, and algorithm 1 where COST is a mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fisherviz.network.likelihoods import Likelihood
from fisherviz.optim import CWNGD, KFAC


class DecayedAdam(torch.optim.Adam):
    """TensorFlow's Adam with a learning rate and an ε that decay geometrically down to a floor, as in section IV.

    TensorFlow adds ε to the root of the second moment before its bias is corrected (Kingma & Ba 2015, end of section
    2): torch's ε at step t is ε/√(1 − β₂ᵗ), 30 times as much at the first step. With an ε of 0.183 that decides.

    Args:
        params: parameters.
        lr: initial learning rate.
        lr_rate: factor of a step.
        lr_floor: smallest learning rate.
        eps: initial ε.
        eps_rate: factor of a step.
        eps_floor: smallest ε.
        momentum: β₁.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.24,
        lr_rate: float = 0.9994,
        lr_floor: float = 1e-4,
        eps: float = 0.183,
        eps_rate: float = 0.9998,
        eps_floor: float = 1e-8,
        momentum: float = 0.97,
    ) -> None:
        super().__init__(params, lr=lr, eps=eps, betas=(momentum, 0.999))
        self.rules = {"lr": (lr, lr_rate, lr_floor), "eps": (eps, eps_rate, eps_floor)}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step at the present rates.

        Args:
            closure: as for Adam.
        """
        _decay(self.param_groups, self.rules)
        for group in self.param_groups:
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** group["decayed"])
        return super().step(closure)


class DecayedKFAC(KFAC):
    """Plain K-FAC whose learning rate and damping decay geometrically down to a floor, as in section IV.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        lr: initial learning rate.
        lr_rate: factor of a step.
        lr_floor: smallest learning rate.
        damping: initial λ.
        damping_rate: factor of a step.
        damping_floor: smallest λ.
        momentum: of the direction.
        T: steps between inverses.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        lr: float = 0.23,
        lr_rate: float = 0.9989,
        lr_floor: float = 1e-4,
        damping: float = 0.289,
        damping_rate: float = 0.9997,
        damping_floor: float = 1e-6,
        momentum: float = 0.98,
        T: int = 1,
    ) -> None:
        super().__init__(
            model, likelihood, rescale=False, adapt=False, lr=lr, damping=damping, momentum=momentum, T=T,
            kl_clip=math.inf,
        )  # fmt: skip
        self.rules = {"lr": (lr, lr_rate, lr_floor), "damping": (damping, damping_rate, damping_floor)}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step at the present rates.

        Args:
            closure: as for KFAC.
        """
        _decay(self.param_groups, self.rules)
        return self._step(closure)


def _decay(groups: list[dict[str, Any]], rules: Mapping[str, tuple[float, float, float]]) -> None:
    for group in groups:
        step = group.get("decayed", 0)
        group["decayed"] = step + 1
        for name, (first, rate, floor) in rules.items():
            group[name] = max(first * rate**step, floor)


class MeanCostCWNGD(CWNGD):
    """Algorithm 1 where COST is the batch's mean, so that each example's derivative carries a 1/P.

    F is then divided by P² and AVG₁ by P once more: a natural gradient of the mean Fisher with damping γ P.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        batch: P.
        lr: the paper's α.
        damping: the paper's γ.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        batch: int,
        lr: float = 1.0,
        damping: float = 1e-4,
    ) -> None:
        super().__init__(model, likelihood, **{**CWNGD.PAPER, "lr": lr / batch, "damping": damping, "loss_scale": 1.0})
