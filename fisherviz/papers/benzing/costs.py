"""Benzing 2021, what steps of the optimizers cost, in seconds and in operations, and those of SGD.

Steps of all methods take turns, so that a busy machine slows all of them alike. A cycle of T steps renews the matrices
once: its mean is taken from the medians of the steps that do and of those that don't.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fisherviz import models
from fisherviz.papers.benzing.balanced import BALANCED
from fisherviz.papers.trials.work import Run, kept
from fisherviz.support.counting import counting
from fisherviz.support.timing import so_far
from fisherviz.training.data import Batches
from fisherviz.training.optimizers import make_optimizer

PERIODS = (100, 10, 1)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "natural gradient": ("subsampled", {"lr": 1e-6, "damping": 0.01}),
    "K-FAC": (BALANCED, {"lr": 1e-4, "damping": 0.01}),
    "FOOF": ("foof", {"lr": 1e-3, "damping": 1.0}),
}
"""Rates are small: what a step costs does not hang on them."""
SINGLE = "natural gradient, λ = 1"
OPTIONS = {**METHODS, SINGLE: ("subsampled", {"lr": 1e-6, "damping": 1.0})}
"""Below such a damping Woodbury's difference loses too many digits of float32, and is taken in float64."""
SIZES = (784, 1000, 1000, 1000, 10)
LARGE = 1000
"""Examples of a large Fisher batch (section 3, footnote 3)."""


@dataclass(frozen=True)
class Scale:
    """How much is measured: width, cycles of T = 100, 10 and 1, and of training T = 100 and 1 beside each other."""

    width: int
    cycles: tuple[int, int, int]
    large: int
    limit: int | None
    epochs: int
    trials: int
    seeds: int
    periods: tuple[int, int, int] = PERIODS


SCALES = {
    "smoke": Scale(12, (1, 1, 2), 50, 200, 1, 1, 2, (4, 2, 1)),
    "desk": Scale(1000, (2, 4, 8), LARGE, 2000, 3, 4, 3),
    "paper": Scale(1000, (10, 20, 40), LARGE, None, 10, 20, 3),
}


@dataclass(frozen=True)
class Costs:
    """Of a step on the average, by method and T; beside SGD's.

    Args:
        seconds: of a step.
        operations: of a step, a multiply-add as two.
        usual: seconds of a step that renews nothing, at the longest T.
        device: where.
        large: seconds of a step with a Fisher batch of `LARGE`, and of inverting its matrix.
    """

    seconds: Mapping[str, Mapping[str, float]]
    operations: Mapping[str, Mapping[str, float]]
    usual: Mapping[str, float]
    device: str
    large: Mapping[str, float]

    def ratio(self, name: str, T: int, of: str = "seconds") -> float:
        """Steps of SGD that a step costs."""
        found = getattr(self, of)
        return found[name][str(T)] / found["SGD"]["1"]

    def times(self, name: str, T: int, of: str = "seconds") -> str:
        """The same in words."""
        return f"{self.ratio(name, T, of):.2f}"


def costs(run: Run) -> Costs:
    """Measure, or what is kept of it.

    Args:
        run: scale, seed and device.
    """
    scale = SCALES[run.scale]
    what = {"step_costs": METHODS, "width": scale.width, "periods": scale.periods, "cycles": scale.cycles,
            "large": scale.large, "seed": run.seed, "device": run.device}  # fmt: skip
    found = kept(what, lambda: _measured(scale, run), run)
    return Costs(found["seconds"], found["operations"], found["usual"], run.device, found["large_batch"])


def in_single(run: Run) -> float:
    """Steps of SGD that an amortised natural-gradient step costs where float32 suffices, or what is kept of it.

    Args:
        run: scale, seed and device.
    """
    scale = SCALES[run.scale]
    what = {"step_cost": SINGLE, "options": OPTIONS[SINGLE], "width": scale.width, "T": scale.periods[0],
            "seed": run.seed, "device": run.device}  # fmt: skip

    def measure() -> dict[str, Any]:
        steppers = [_Stepper(name, T, 1, scale, run) for name, T in ((SINGLE, scale.periods[0]), ("SGD", 1))]
        for _ in range(scale.periods[0]):
            for one in steppers:
                one.timed()
        return {"ratio": steppers[0].mean / steppers[1].usual}

    return float(kept(what, measure, run)["ratio"])


class _Stepper:
    """A training loop that is advanced step by step and noted."""

    def __init__(self, name: str, T: int, cycles: int, scale: Scale, run: Run, batch: int = 100) -> None:
        self.name, self.T, self.left = name, T, T * cycles
        self.model = models.build("foof-mlp", seed=run.seed, hidden=(scale.width,) * 3).to(run.device)
        self.device = torch.device(run.device)
        generator = torch.Generator().manual_seed(run.seed)
        x = torch.randn(10 * batch, SIZES[0], generator=generator).to(run.device)
        y = torch.randint(SIZES[-1], (10 * batch,), generator=generator).to(run.device)
        self.batches = list(zip(x.split(100), y.split(100), strict=True))
        optimizer, options = ("sgd", {"lr": 1e-4}) if name == "SGD" else OPTIONS[name]
        extra = {} if name == "SGD" else {"T": T}
        few = Batches(x, y, batch)
        self.optimizer: Any = make_optimizer(optimizer, {**options, **extra}, self.model, "categorical", few, "paper")
        self.done = 0
        self.taken: list[float] = []

    def step(self) -> None:
        x, y = self.batches[self.done % len(self.batches)]
        self.done += 1
        self.optimizer.zero_grad()
        cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def timed(self) -> None:
        """One step, noted."""
        self.taken.append(_seconds(self.step, self.device))
        self.left -= 1

    @property
    def usual(self) -> float:
        """Seconds of a step that renews nothing; at T = 1 of any."""
        return median(s for i, s in enumerate(self.taken) if self.T == 1 or i % self.T)

    @property
    def mean(self) -> float:
        """Over a cycle."""
        return ((self.T - 1) * self.usual + median(self.taken[:: self.T])) / self.T


def _measured(scale: Scale, run: Run) -> dict[str, Any]:
    steppers = [
        _Stepper(name, T, cycles, scale, run)
        for name in METHODS
        for T, cycles in zip(scale.periods, scale.cycles, strict=True)
    ]
    sgd = _Stepper("SGD", 1, scale.periods[0] * scale.cycles[0], scale, run)
    operations = {one.name: {str(one.T): _operations(one)} for one in (sgd,)}
    for one in steppers:
        operations.setdefault(one.name, {})[str(one.T)] = _operations(one)
    while sgd.left:
        for one in (sgd, *steppers):
            if one.left > 0:
                one.timed()
    seconds: dict[str, dict[str, float]] = {"SGD": {"1": sgd.mean}}
    for one in steppers:
        seconds.setdefault(one.name, {})[str(one.T)] = one.mean
    usual = {one.name: one.usual for one in steppers if scale.periods[0] == one.T}
    return {"seconds": seconds, "operations": operations, "usual": usual, "large_batch": _large(scale, run)}


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """CPU seconds of a call, on a GPU those on the clock."""
    if device.type == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    before = so_far(device)
    work()
    return (so_far(device) - before).seconds


def _operations(one: _Stepper) -> float:
    """Of a step on the average over a cycle; leaves it before a step that renews."""
    for _ in range(one.T):  # the first steps build what later ones keep
        one.step()
    with counting() as counter:
        for _ in range(one.T):
            one.step()
    return counter.operations / one.T


def _large(scale: Scale, run: Run) -> dict[str, float]:
    """Seconds of natural-gradient steps with a large Fisher batch, and of inverting a matrix of that size."""
    stepper = _Stepper("natural gradient", 1, 4, scale, run, scale.large)
    stepper.step()
    generator = torch.Generator().manual_seed(run.seed)
    root = torch.randn(scale.large, scale.large, generator=generator).to(run.device)
    gram = root @ root.mT + scale.large * torch.eye(scale.large, device=run.device)
    inverting = []
    for _ in range(4):
        stepper.timed()
        inverting.append(_seconds(lambda: torch.linalg.inv(gram), stepper.device))
    with counting() as counter:
        stepper.step()
    with counting() as inverse:
        torch.linalg.inv(gram)
    return {"step": median(stepper.taken), "inverse": median(inverting),
            "step_operations": counter.operations, "inverse_operations": inverse.operations}  # fmt: skip
