"""λ and γ as an optimizer uses them now: what is logged, monitored and named in errors."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov


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
    given = _given(optimizer)
    if isinstance(given, FactoredTikhonov):
        return {"lambda": given.gamma**2, "gamma": given.gamma}
    if isinstance(given, Tikhonov):
        given = given.value
    if not isinstance(given, Real | Tensor):
        return {}
    value = float(given)
    factored = getattr(optimizer, "heuristic_damping", False) and value > 0
    return {"lambda": value, **({"gamma": value**0.5} if factored else {})}


def damping_of(optimizer: torch.optim.Optimizer) -> Damping | None:
    """The damping of an optimizer as it is now; None where it has none.

    Args:
        optimizer: any.
    """
    found = strengths(optimizer)
    if "gamma" in found and not getattr(optimizer, "heuristic_damping", True):
        return Tikhonov(found["gamma"] ** 2)
    if "gamma" in found:
        given = _given(optimizer)
        return FactoredTikhonov(
            found["gamma"], given.pi if isinstance(given, FactoredTikhonov) else FactoredTikhonov.pi
        )
    return Tikhonov(found["lambda"]) if found.get("lambda") else None


def _given(optimizer: torch.optim.Optimizer) -> Any:
    """What the first preconditioned group was given as its damping."""
    groups = [group for group in optimizer.param_groups if group.get("approximation") != "none"]
    return groups[0].get("damping") if groups else None
