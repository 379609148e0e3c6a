"""The baseline that torch lacks: Nesterov's momentum on the schedule of Sutskever et al. 2013, section 3.

v_t = μ_t v_{t-1} − lr ∇f(θ_{t-1} + μ_t v_{t-1}), θ_t = θ_{t-1} + v_t, with
μ_t = min(1 − 2^(−1−log₂(⌊t/250⌋+1)), μ_max). The parameters hold the point where the gradient is taken, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def sutskever_momentum(step: int, maximum: float, period: int = 250) -> float:
    """μ of a step (equation 5).

    Args:
        step: t, from 1.
        maximum: μ_max.
        period: steps for which μ stays the same.
    """
    return min(1 - 0.5 / (step // period + 1), maximum)


class Nesterov(torch.optim.Optimizer):
    """SGD with Nesterov's momentum, whose μ grows on Sutskever's schedule.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: μ_max; the K-FAC paper's baseline takes the best of 0.9, 0.99, 0.995 and 0.999.
        period: steps for which μ stays the same.
        weight_decay: ℓ₂ coefficient.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.99,
        period: int = 250,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0 or not 0 <= momentum < 1 or not weight_decay >= 0 or period < 1:
            raise ValueError(
                f"lr and weight_decay must not be negative, momentum in [0, 1) and period at least 1, got "
                f"lr={lr}, weight_decay={weight_decay}, momentum={momentum}, period={period}."
            )
        defaults = {"lr": lr, "momentum": momentum, "period": period, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the loss and its gradients once more.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            now, following = (sutskever_momentum(group["step"] + i, group["momentum"], group["period"]) for i in (0, 1))
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = g.clone()
                else:
                    state["momentum_buffer"].mul_(now).add_(g)
                p.add_(g, alpha=-group["lr"]).add_(state["momentum_buffer"], alpha=-group["lr"] * following)
        return loss
