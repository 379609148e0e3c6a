"""λ and γ as an optimizer uses them now: what is logged, monitored and named in errors."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from fisherviz.operators.damping import FactoredTikhonov, Tikhonov


def strengths(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """λ and γ of an optimizer, as far as it has them.

    Args:
        optimizer: any; λ is its own where it adapts one, otherwise the damping of its first preconditioned group.

    Returns:
        "lambda", and "gamma" where Kronecker factors are damped.
    """
    if getattr(optimizer, "rescale", True) and (lam := getattr(optimizer, "lam", None)) is not None:
        gamma = getattr(optimizer, "gamma", None)
        return {"lambda": float(lam), **({} if gamma is None else {"gamma": float(gamma)})}
    groups = [group for group in optimizer.param_groups if group.get("approximation") != "none"]
    given = groups[0].get("damping") if groups else None
    if isinstance(given, FactoredTikhonov):
        return {"lambda": given.gamma**2, "gamma": given.gamma}
    if isinstance(given, Tikhonov):
        given = given.value
    if not isinstance(given, Real | Tensor):
        return {}
    value = float(given)
    factored = getattr(optimizer, "heuristic_damping", False) and value > 0
    return {"lambda": value, **({"gamma": value**0.5} if factored else {})}
