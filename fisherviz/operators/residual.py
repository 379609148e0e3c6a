"""What a solve leaves of its right-hand side: told where it is not small.

A factorisation that succeeds may still give digits that are rounding alone, where the condition number comes near the
precision. One product tells, whatever the structure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherviz.operators.lanczos import LARGE
from fisherviz.support.warning import warn


def residual_of(image: Tensor, right: Tensor) -> float:
    """The largest ‖v − M x‖ / ‖v‖ of the columns.

    Args:
        image: M x, (n, k).
        right: v, (n, k).

    Returns:
        The number; 0 where every column of v is zero.
    """
    if not right.numel():
        return 0.0
    unit = right.abs().amax(0).double()
    unit = unit.where(unit > 0, torch.ones_like(unit))
    left = torch.linalg.vector_norm((right.double() - image.double()) / unit, dim=0)
    return float((left / torch.linalg.vector_norm(right.double() / unit, dim=0).clamp_min(1e-300)).max())


def tell(residual: float, what: str, dtype: torch.dtype, size: Callable[[], float]) -> None:
    """Warn of a residual that is not small.

    Args:
        residual: relative to the right-hand side.
        what: what was solved, in words.
        dtype: that it was solved in.
        size: gives a norm of the matrix, which no eigenvalue exceeds.
    """
    if not residual <= LARGE:
        enough = torch.finfo(dtype).eps / LARGE * size()
        name = str(dtype).removeprefix("torch.")
        other = "" if dtype == torch.float64 else ", or in float64"
        warn(
            f"the solve of {what} in {name} leaves {residual:.2g} of its right-hand side; "
            f"solve with a damping of at least {enough:.0e}{other}."
        )


def tell_of_rounding(damping: float, size: float, dtype: torch.dtype) -> None:
    """Warn of a damping below the rounding of what it is added to.

    Args:
        damping: λ.
        size: a norm of the matrix.
        dtype: that the matrix was computed in.
    """
    if 0 < damping < torch.finfo(dtype).eps * size:
        name = str(dtype).removeprefix("torch.")
        warn(
            f"a damping of {damping:.1e} is below {name}'s rounding of this Fisher: gradients are solved for its "
            "rounding errors; use a larger damping or a float64 model."
        )
