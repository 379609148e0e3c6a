"""Memory planning: what a request will take is compared with what is there before anything is allocated.

Relied on by everything that materialises a matrix or keeps captures.
"""

from __future__ import annotations

import ctypes
import math
import sys
from functools import cache
from numbers import Real

import torch
from torch import Tensor

from fisherviz.support import limits
from fisherviz.support.numbers import human

KEEP_FRACTION = 0.25
"""Captures are kept between passes while they stay below this share of what may be taken: algebra needs the rest."""

PIECE_FRACTION = 1 / 16
"""Share of the memory that one array of a piece may take."""
DENSE_LIMIT = 200_000_000
"""Entries above which no operator is made dense behind the caller's back."""


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

    On the CPU these are physical, without swapping, within the limits of the container and of the process; processes
    that torchrun has started on one machine share them.
    """
    free = _free(device)
    return free if config.memory_budget is None else min(free, config.memory_budget)


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else limits.free()


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


def require_dense(rows: int, cols: int, what: str, like: Tensor) -> None:
    """Refuse a dense array that is larger than `DENSE_LIMIT` entries, or that does not fit with two copies.

    Args:
        rows: number of rows.
        cols: number of columns.
        what: what would need it, in words.
        like: a tensor of its type, where it would be.

    Raises:
        MemoryError: with the size and the way out.
    """
    if rows * cols > DENSE_LIMIT:
        raise MemoryError(
            f"{what} needs a dense {rows} x {cols} array ({rows * cols * 8 / 2**30:.1f} GiB in float64), "
            f"more than {DENSE_LIMIT:.0e} entries; take one layer at a time or a structured approximation."
        )
    size, way_out = 3 * rows * cols * like.element_size(), "take one layer at a time or a structured approximation"
    require(size, like.device, f"{what}, dense {rows:,} x {cols:,},", way_out)


def require_samples(size: int, n: int, device: torch.device, more: int = 0) -> None:
    """Raise MemoryError if n samples of so many parameters, and `more` bytes beside them, are not free.

    Noise, what is solved, its parts and the deviations are held together in float64.
    """
    require(5 * 8 * size * n + more, device, f"{n:,} samples of {size:,} parameters", "draw fewer at a time, with n=")


def at_once(entries: int, like: Tensor) -> int:
    """Entries that are held at once where work may be done piece by piece: so many, or fewer where memory is small.

    What is small is decided by `config.memory_budget` and by what the machine has in all, not by what is free: pieces
    are the same in every run.

    Args:
        entries: that are held where memory is large.
        like: a tensor of their type, where they are.
    """
    whole = _whole(like.device) if config.memory_budget is None else min(_whole(like.device), config.memory_budget)
    return max(1, min(entries, int(PIECE_FRACTION * whole) // like.element_size()))


def give_back() -> None:
    """Give memory that is free back to the system: glibc keeps the holes between blocks of a pass's many sizes."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@cache
def _whole(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else limits.whole()


def keep_limit(device: torch.device) -> int:
    """Bytes of captures that may stay in memory between passes."""
    return int(KEEP_FRACTION * available(device))
