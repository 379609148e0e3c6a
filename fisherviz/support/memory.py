"""Memory planning: what a request will take is compared with what is there before anything is allocated.

Relied on by everything that materialises a matrix or keeps captures.
"""

from __future__ import annotations

import math
import os
from numbers import Real

import torch

from fisherviz.support.numbers import human

KEEP_FRACTION = 0.25
"""Captures are kept between passes while they stay below this share of what may be taken: algebra needs the rest."""


class Config:
    """What holds for all of the package, as `fv.config`.

    Attributes:
        memory_budget: bytes that a request may take at its peak, beside the model and the data; None: what is free.
    """

    def __init__(self) -> None:
        self._memory_budget: int | None = None

    @property
    def memory_budget(self) -> int | None:
        """Bytes, or None."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, value: float | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf):
            raise ValueError(f"memory_budget is a positive number of bytes, or None for what is free, not {value!r}.")
        self._memory_budget = None if value is None else int(value)

    def __repr__(self) -> str:
        budget = "what is free" if self._memory_budget is None else human(self._memory_budget)
        return f"fisherviz config: memory_budget {budget}"


config = Config()


def available(device: torch.device) -> int:
    """Bytes that may be taken on a device: those that are free, or `config.memory_budget` where that is less.

    On the CPU these are physical, without swapping; processes that torchrun has started on one machine share them.
    """
    free = _free(device)
    return free if config.memory_budget is None else min(free, config.memory_budget)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _physical() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _physical() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: ask the system for its free pages instead
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def require(size: int, device: torch.device, what: str, instead: str) -> None:
    """Raise MemoryError if `size` bytes are not free.

    Args:
        size: bytes the request will take at its peak.
        device: where.
        what: what would be made, with its shape.
        instead: the way out.

    Raises:
        MemoryError: with the figures and the way out.
    """
    free = available(device)
    if size > free:
        set_so = config.memory_budget is not None and free == config.memory_budget
        there = f"fv.config.memory_budget is {human(free)}" if set_so else f"{human(free)} are free on {device}"
        raise MemoryError(f"{what} takes {human(size)}, but {there}; {instead}.")


def keep_limit(device: torch.device) -> int:
    """Bytes of captures that may stay in memory between passes."""
    return int(KEEP_FRACTION * available(device))
