"""Timing and counting: CPU seconds on one thread between two passes of the same batch, wall seconds on two, operations.

Shared machines make single timings swing, so that a ratio is the quotient of two minima over interleaved rounds. Matrix
products and factorisations are counted by the dispatcher; element-wise work is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fisherviz.support.counting import Counter

SLOW = 3.0
"""Seconds above which a workload gets two rounds only."""
PASSES = 5
"""Passes on either side of a workload, of which the fastest counts; one where a pass takes long."""


@dataclass(frozen=True)
class Timing:
    """The fastest of several rounds.

    Attributes:
        seconds: CPU seconds of the workload, one thread.
        forward_backward: CPU seconds of one forward+backward pass, measured before and after each round.
        wall_two_threads: wall seconds with two threads.
        gflop: 10⁹ multiplications and additions in matrix products, convolutions and factorisations.
    """

    seconds: float
    forward_backward: float
    wall_two_threads: float | None
    gflop: float

    @property
    def ratio(self) -> float:
        """Passes that the workload costs."""
        return self.seconds / self.forward_backward


def measure(work: Callable[[], Any], one_pass: Callable[[], Any], rounds: int, wall: bool = True) -> Timing:
    """Measure a workload between passes.

    Args:
        work: the workload.
        one_pass: one forward+backward pass of the same batch.
        rounds: how often; at most two for slow workloads.
        wall: whether to measure two threads as well.

    Returns:
        The minima.
    """
    torch.set_num_threads(1)
    several = PASSES if cpu_seconds(one_pass) < 0.02 else 1
    gflop = operations(work)  # also warms up
    passes, works = [], []
    for done in range(rounds):
        passes += [cpu_seconds(one_pass) for _ in range(several)]
        works.append(cpu_seconds(work))
        passes += [cpu_seconds(one_pass) for _ in range(several)]
        if done and min(works) > SLOW:
            break
    if not wall:
        return Timing(min(works), min(passes), None, gflop)
    torch.set_num_threads(2)
    walls = [wall_seconds(work) for _ in range(1 if min(works) > SLOW else 3)]
    torch.set_num_threads(1)
    return Timing(min(works), min(passes), min(walls), gflop)


def cpu_seconds(f: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    f()
    return time.process_time() - start


def wall_seconds(f: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def operations(work: Callable[[], Any]) -> float:
    """10⁹ operations of a workload; a multiply-add counts as two."""
    with Counter() as counter:
        work()
    return counter.operations / 1e9
