"""Memory that a workload takes at its peak, as torch's profiler sees tensors come and go."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(work: Callable[[], Any]) -> int:
    """Bytes of tensors that a workload holds at its peak, beside those that were there.

    Args:
        work: on the CPU.
    """
    gc.collect()  # what is freed inside must have been allocated inside
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
