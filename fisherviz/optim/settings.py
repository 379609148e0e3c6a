"""What an optimizer's numbers must be, and which saved states it takes.

Checked before anything is changed: a refused option or state leaves the optimizer as it was. Others rely on
`check_state` having seen every key and every shape that loading reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from fisherviz.damping import as_damping
from fisherviz.layers import Layer

FOREIGN = "this is no state of a fisherviz optimizer; load one that its state_dict() gave."

DAMAGED = "the state under 'fisherviz' cannot be read ({!r}); load one that state_dict() of this class gave, unchanged."
ACCUMULATED = (
    "the step averages {} passes, and without loss_scale each loss is taken for the mean over its own pass's "
    "examples; where losses were divided for gradient accumulation, give the optimizer loss_scale=c, each loss "
    "being c times the sum of its examples' nll."
)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse what is not on the list."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Refuse what is not a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a positive number."""
    if isinstance(value, bool) or not isinstance(value, Real | Tensor) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}.")


def check_loss_scale(value: Any) -> None:
    """Refuse what is neither None nor a positive number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"loss_scale must be a positive number or None, got {value!r}.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"loss_scale must be positive and finite, got {value!r}.")


def check_damping(value: Any) -> None:
    """Refuse what is no damping; None would silently be none at all."""
    if value is None:
        raise TypeError("damping must be a number, a Tikhonov or a FactoredTikhonov, got None; 0.0 means none at all.")
    as_damping(value)


def shapes_of(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Shapes of the preconditioned parameters by name."""
    return {name: list(p.shape) for layer in layers for name, p in layer.parameters.items()}


def check_state(state: Any, own: Mapping[str, Any]) -> None:
    """Refuse a state that another optimizer, network or method gave.

    Args:
        state: what was passed to `load_state_dict`.
        own: what this optimizer would save now under "fisherviz".

    Raises:
        ValueError: it is none of a fisherviz optimizer, of another method or network, or incomplete.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("fisherviz"), Mapping):
        raise ValueError(FOREIGN)
    saved = state["fisherviz"]
    if lacking := [key for key in ("state", "param_groups") if key not in state]:
        raise ValueError(f"the state lacks {lacking[0]!r}; load all of what state_dict() gave.")
    if "method" in saved and saved["method"] != own["method"]:
        raise ValueError(f"the state is one of method {saved['method']!r}, this optimizer's is {own['method']!r}.")
    if lacking := [key for key in own if key not in saved and key != "adaptive"]:
        raise ValueError(f"the state under 'fisherviz' lacks {lacking[0]!r}; load one of the same optimizer's class.")
    for name in {**own["shapes"], **saved["shapes"]}:
        here, there = own["shapes"].get(name), saved["shapes"].get(name)
        if here != there:
            raise ValueError(
                f"the state is one of another network: parameter {name!r} has shape {there} there and {here} here."
            )
