"""Timing of optimizer steps: whole cycles of T steps in blocks between blocks of SGD steps, minima over rounds.

A cycle holds one factorisation, so that its mean is the whole amortised cost. The same estimator serves both sides:
every position's fastest round, averaged over the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from statistics import median

import torch

from benchmarks.measure import cpu_seconds, operations, wall_seconds

BLOCK = 10
"""Steps in a row of either side; the positions timed where a cycle is shorter."""
WARM_UP = 3
"""Steps before anything is counted or timed; complete KFAC inverts at each of its first three."""


@dataclass(frozen=True)
class StepTiming:
    """The fastest of several rounds.

    Attributes:
        seconds: CPU seconds of one step on one thread, mean over the cycle.
        sgd: CPU seconds of one SGD step, measured between the blocks.
        slowest: CPU seconds of the cycle's slowest step, which factorises.
        usual: CPU seconds of its median step.
        gflop: 10⁹ operations of one step, mean over the cycle.
        sgd_gflop: those of one SGD step.
        wall_two_threads: wall seconds of one step on two threads, mean over the cycle.
    """

    seconds: float
    sgd: float
    slowest: float
    usual: float
    gflop: float
    sgd_gflop: float
    wall_two_threads: float | None

    @property
    def ratio(self) -> float:
        """SGD steps that one step costs."""
        return self.seconds / self.sgd


def measure_steps(
    step: Callable[[], object],
    sgd: Callable[[], object],
    cycle: int,
    rounds: int,
    wall: bool = True,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> StepTiming:
    """Measure steps between SGD steps.

    Args:
        step: one step.
        sgd: one SGD step of the same network and batch.
        cycle: steps from one factorisation to the next.
        rounds: how often every position of the cycle is timed.
        wall: whether to measure two threads as well.
        clock: times one call.

    Returns:
        The minima.
    """
    torch.set_num_threads(1)
    for _ in range(WARM_UP):
        step()
        sgd()
    gflop = operations(lambda: [step() for _ in range(cycle)]) / cycle
    sgd_gflop = operations(sgd)
    positions = cycle if cycle > 1 else BLOCK
    mine, theirs = [inf] * positions, [inf] * positions
    for _ in range(rounds):
        for start in range(0, positions, BLOCK):
            block = range(start, min(start + BLOCK, positions))
            for p in block:
                mine[p] = min(mine[p], clock(step))
            for p in block:
                theirs[p] = min(theirs[p], clock(sgd))
    walls = None
    if wall:
        torch.set_num_threads(2)
        repeats = 2 if positions == BLOCK else 1  # a long cycle is long enough
        walls = min(wall_seconds(lambda: [step() for _ in range(positions)]) for _ in range(repeats)) / positions
        torch.set_num_threads(1)
    return StepTiming(
        sum(mine) / positions, sum(theirs) / positions, max(mine), median(mine), gflop, sgd_gflop, walls
    )  # fmt: skip
