"""Memory planning: what a request will take is compared with what is there before anything is allocated.

Relied on by everything that materialises a matrix or keeps captures (DESIGN section 6, "Tiles").
"""

from __future__ import annotations

import os

import torch

KEEP_FRACTION = 0.25
KEEP_BYTES = 2 * 2**30
"""Captures are kept between passes while they stay below this and below a quarter of the free memory."""


def available(device: torch.device) -> int:
    """Free bytes on a device; on the CPU, physical memory that can be had without swapping.

    Processes that torchrun has started on one machine share it evenly.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _free() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free() -> int:
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
        raise MemoryError(f"{what} takes {human(size)}, but {human(free)} are free on {device}; {instead}.")


def keep_limit(device: torch.device) -> int:
    """Bytes of captures that may stay in memory between passes."""
    return min(KEEP_BYTES, int(KEEP_FRACTION * available(device)))


def human(size: float) -> str:
    """Bytes as a short figure with its unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
