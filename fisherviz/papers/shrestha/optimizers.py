"""SGD and natural gradients whose learning rate decays, as section 4.3 of Shrestha 2023 found to help.

The paper does not say how its rate decays; here it is lr / (1 + k / halved) in step k, k from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fisherviz.network.likelihoods import Likelihood
from fisherviz.optim import NaturalGradient


class DecayedSGD(torch.optim.SGD):
    """SGD at a rate that decays.

    Args:
        params: parameters.
        lr: first learning rate.
        halved: steps after which it is half of that.
    """

    def __init__(self, params: Iterable[Any], lr: float, halved: int) -> None:
        super().__init__(params, lr=lr)
        _begin(self.param_groups, halved)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step at the present rate.

        Args:
            closure: as for SGD.
        """
        _decay(self.param_groups)
        return super().step(closure)


class DecayedNaturalGradient(NaturalGradient):
    """The natural gradient of each mini-batch's empirical Fisher, without momentum, at a rate that decays.

    Args:
        model: the model.
        likelihood: as for `fv.Probe`.
        method: "exact" or "layer".
        lr: first learning rate.
        damping: β.
        halved: steps after which the rate is half of the first.
        **options: of the method.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | nn.Module,
        *,
        method: str,
        lr: float,
        damping: float,
        halved: int,
        **options: Any,
    ) -> None:
        super().__init__(
            model, likelihood, method, lr=lr, damping=damping, momentum=0.0, kind="empirical", decay=0.0,
            kl_clip=math.inf, **options,
        )  # fmt: skip
        _begin(self.param_groups, halved)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step at the present rate.

        Args:
            closure: as for `NaturalGradient`.
        """
        _decay(self.param_groups)
        return self._step(closure)


def _begin(groups: list[dict[str, Any]], halved: int) -> None:
    for group in groups:
        group |= {"first_lr": group["lr"], "halved": halved, "decayed": 0}


def _decay(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        group["lr"] = group["first_lr"] / (1 + group["decayed"] / group["halved"])
        group["decayed"] += 1
