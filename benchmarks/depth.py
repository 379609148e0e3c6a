"""TENGraD's cost against depth, beside SGD's and that of the exact natural gradient (Shrestha 2023, figure 5).

Hidden layers of 20 units, batch 128, inputs and output as in the weather table (12 → 1, Gaussian likelihood). The paper
names no axis values; what is judged is how much faster TENGraD's cost grows than SGD's from depth 4 to depth 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.cycles import measure_steps
from benchmarks.steps import BATCHES, LR, Problem, Trainer
from fisherviz import optim
from fisherviz.papers.shrestha.depth import half_squares, network, random_batch
from fisherviz.support.peaks import peak_bytes

DEPTHS = (1, 2, 4, 8, 16, 32)
FROM, TO = 4, 32
EXACT_UP_TO = 8
"""Depth up to which the exact Fisher (P × P) is taken; P = 3221 there."""
METHODS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=LR),
    "tengrad": lambda model: optim.TENGraD.paper(model, "gaussian", lr=1e-4),
    "exact": lambda model: optim.NaturalGradient(model, "gaussian", "exact", lr=1e-4, damping=0.1),
}


def problem(depth: int) -> Problem:
    """A regression network with `depth` hidden layers."""
    generator = torch.Generator().manual_seed(1)
    return Problem(network(depth), [random_batch(generator) for _ in range(BATCHES)], half_squares)


def trainer(method: str, task: Problem) -> Trainer:
    """One method on a copy of the network."""
    own = task.copy()
    return Trainer(own, METHODS[method](own.model))


def run(rounds: int | None = None) -> dict[str, Any]:
    """Measure all depths in this process.

    Args:
        rounds: of timing; None: 20.

    Returns:
        Under "depths" milliseconds of a step and KiB at its peak by depth and method, under "growth" each method's
        cost at depth `TO` over that at depth `FROM`.
    """
    depths: dict[str, Any] = {}
    for depth in DEPTHS:
        found = {}
        for method in ("tengrad", "exact") if depth <= EXACT_UP_TO else ("tengrad",):
            sgd, other = trainer("sgd", problem(depth)), trainer(method, problem(depth))
            few = 3 if method == "exact" else 20
            timing = measure_steps(other.step, sgd.step, 1, few if rounds is None else min(few, rounds), wall=False)
            found[method] = {"ms": 1e3 * timing.seconds, "kib": peak_kib(method, depth)}
            if method == "tengrad":
                found["sgd"] = {"ms": 1e3 * timing.sgd, "kib": peak_kib("sgd", depth)}
        depths[str(depth)] = {method: found[method] for method in METHODS if method in found}
    growth = {method: depths[str(TO)][method]["ms"] / depths[str(FROM)][method]["ms"] for method in ("sgd", "tengrad")}
    slopes = {method: math.log(ratio) / math.log(TO / FROM) for method, ratio in growth.items()}
    return {"depths": depths, "growth": growth, "slopes": slopes}


def peak_kib(method: str, depth: int) -> float:
    """KiB of tensors at the peak of three steps, network and optimizer included, data not, by torch's profiler."""
    task = problem(depth)

    def steps() -> None:
        made = trainer(method, task)
        for _ in range(3):
            made.step()

    return peak_bytes(steps) / 2**10
