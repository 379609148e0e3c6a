"""What processes that train together agree on: sums and means of single numbers over all of them.

Every process must ask for the same numbers in the same order; all get the same bits, so that decisions made from them
are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def distributed() -> bool:
    """Whether several processes train together."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over the processes, in float64; the values themselves in a run of one process.

    Args:
        values: this process's.
        device: where the processes exchange tensors.

    Returns:
        As many numbers, the same in every process.
    """
    if not distributed():
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()
