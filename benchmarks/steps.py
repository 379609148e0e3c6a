"""The rows of `benchmarks.optim`: networks and batches, our optimizers on them, their goals.

The network of most rows is 784-1000-1000-1000-10 (ReLU, no biases), batch 100, float32, plain SGD beside it; a
step's cost doesn't depend on what the inputs show, which are random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherviz import optim

BATCHES = 20
LR = 1e-3
DAMPING = 1.0
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False)
class Problem:
    """A network with batches that are cycled through.

    Attributes:
        model: the network.
        batches: inputs and labels.
        loss: the mean loss.
    """

    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    loss: Loss = F.cross_entropy

    def copy(self) -> Problem:
        """The same with a network of its own."""
        return Problem(copy.deepcopy(self.model), self.batches, self.loss)


class Trainer:
    """A training loop that is advanced step by step.

    Args:
        problem: whose network is trained.
        opt: the optimizer.
        closure: whether its step takes the closure.
    """

    def __init__(self, problem: Problem, opt: Optimizer, closure: bool = False) -> None:
        self.problem, self.opt, self.closure = problem, opt, closure
        self.k = 0
        self.loss = math.nan
        """Of the last step."""

    def step(self) -> None:
        """One training step."""
        x, y = self.problem.batches[self.k % len(self.problem.batches)]
        self.k += 1

        def evaluate() -> Tensor:
            self.opt.zero_grad()
            loss = self.problem.loss(self.problem.model(x), y)
            loss.backward()
            return loss

        if self.closure:
            loss: Any = self.opt.step(evaluate)  # type: ignore[arg-type]
        else:
            loss = evaluate()
            self.opt.step()
        self.loss = float(loss.detach())


def sgd(problem: Problem) -> Trainer:
    """SGD on a copy of the network."""
    own = problem.copy()
    return Trainer(own, torch.optim.SGD(own.model.parameters(), lr=LR))


def wide(widths: Sequence[int] = (784, 1000, 1000, 1000, 10), batch: int = 100) -> Problem:
    """Benzing's network."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        modules += [nn.Linear(d_in, d_out, bias=False), nn.ReLU()]
    return _labelled(nn.Sequential(*modules[:-1]), batch, widths[0], widths[-1])


def units(inputs: int = 128, outputs: int = 64, batch: int = 1024) -> Problem:
    """A Linear 128→64 alone."""
    torch.manual_seed(0)
    return _labelled(nn.Linear(inputs, outputs), batch, inputs, outputs)


def units_with_head(inputs: int = 128, outputs: int = 64, batch: int = 1024) -> Problem:
    """W5's network: a Linear 128→64 with a head of ten classes."""
    torch.manual_seed(0)
    return _labelled(nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, 10)), batch, inputs, 10)


def _labelled(model: nn.Module, batch: int, inputs: int, classes: int) -> Problem:
    generator = torch.Generator().manual_seed(1)
    return Problem(
        model,
        [
            (
                torch.randn(batch, inputs, generator=generator),
                torch.randint(classes, (batch,), generator=generator),
            )
            for _ in range(BATCHES)
        ],
    )


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        name: of the row.
        text: what is measured.
        optimizer: makes it for a model.
        cycle: steps from one factorisation to the next.
        goal: the goal in `unit`; None: none is set.
        unit: "x" (SGD steps) or "ms" (CPU milliseconds).
        problem: makes network and batches.
        closure: whether a step takes the closure.
        rounds: rounds of timing.
        earlier: public code that could not be run here, with its cost as measured earlier on two other cores.
    """

    name: str
    text: str
    optimizer: Callable[[nn.Module], Optimizer]
    cycle: int = 1
    goal: float | None = None
    unit: str = "x"
    problem: Callable[[], Problem] = wide
    closure: bool = False
    rounds: int = 9
    earlier: str = ""

    def trainer(self, problem: Problem) -> Trainer:
        """The optimizer on a copy of the problem's network."""
        own = problem.copy()
        return Trainer(own, self.optimizer(own.model), self.closure)


def plain_kfac(T: int, heuristic: bool = True) -> Callable[[nn.Module], Optimizer]:
    """KFAC with fixed damping."""
    return lambda model: optim.KFAC.paper(
        model, "categorical", T=T, rescale=False, adapt=False, lr=LR, damping=DAMPING, heuristic_damping=heuristic
    )


def _foof(T: int) -> Callable[[nn.Module], Optimizer]:
    return lambda model: optim.FOOF.paper(model, "categorical", lr=LR, T=T)


def _subsampled(T: int) -> Callable[[nn.Module], Optimizer]:
    return lambda model: optim.SubsampledNaturalGradient.paper(model, "categorical", lr=1e-5, damping=1e-2, T=T)


def _headless(model: nn.Module) -> Optimizer:
    """CW-NGD of the first layer, plain SGD for the head."""
    assert isinstance(model, nn.Sequential)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "approximation": "none"}]
    return optim.CWNGD.paper(model, "categorical", params=groups, lr=LR, damping=1e-2, kind="exact")


_AUTHORS = "FOOF authors' code"
ROWS = {
    row.name: row
    for row in [
        Row("kfac T=1", "KFAC, factors solved with every step", plain_kfac(1), 1, 5.5,
            earlier=f"kfac-pytorch 29.5×, {_AUTHORS} 29.6×"),
        Row("kfac T=100", "KFAC, inverses every 100 steps", plain_kfac(100), 100, 3.0, rounds=5,
            earlier=f"kfac-pytorch 9.2×, {_AUTHORS} 9.1×"),
        Row("kfac T=100 eigenvalues", "the same, damping added to the eigenvalues", plain_kfac(100, False), 100,
            rounds=5),
        Row("foof T=1", "FOOF, factors solved with every step", _foof(1), 1, 4.0,
            earlier=f"{_AUTHORS} 15×"),
        Row("foof T=100", "FOOF, inverses every 100 steps", _foof(100), 100, 2.1, rounds=5,
            earlier=f"{_AUTHORS} 5.1×"),
        Row("subsampled T=1", "natural gradient of an independent mini-batch's Fisher, every step", _subsampled(1), 1,
            2.6, earlier=f"{_AUTHORS} 3.5×"),
        Row("subsampled T=100", "the same, a new mini-batch every 100 steps", _subsampled(100), 100, 2.0, rounds=5,
            earlier=f"{_AUTHORS} 2.5×"),
        Row("adaptive kfac", "complete KFAC with its paper's T₁ = 5, T₂ = T₃ = 20, τ₁ = 1/8, τ₂ = 1/4",
            lambda m: optim.KFAC.paper(m, "categorical"), 20, closure=True,
            rounds=4),  # few: it soon fits 400 examples exactly
        Row("plain kfac T=20", "KFAC, inverses every 20 steps", plain_kfac(20), 20),
        Row("ekfac T=100", "EKFAC, eigendecompositions every 100 steps",
            lambda m: optim.EKFAC.paper(m, "categorical", lr=1e-4, T=100), 100, rounds=3),
        Row("tengrad", "TENGraD, factors every step", lambda m: optim.TENGraD.paper(m, "categorical", lr=1e-4)),
        Row("kbfgs", "K-BFGS, with its second pass",
            lambda m: optim.KBFGS(m, "categorical", lr=1e-2), closure=True),
        Row("cw-ngd", "CW-NGD of one Linear 128→64, batch 1024, empirical kind as in its paper",
            lambda m: optim.CWNGD.paper(m, "categorical", lr=LR, damping=1e-2), 1, 65, "ms", units),
        Row("cw-ngd exact", "CW-NGD of W5's Linear 128→64, batch 1024, exact kind, its head left to SGD",
            _headless, 1, 65, "ms", units_with_head),
    ]
}  # fmt: skip

RELATIONS = [
    ("adaptive kfac", "plain kfac T=20", "at most", 2.5),
    ("adaptive kfac", "kfac T=1", "at most", None),
    ("kfac T=100", "foof T=100", "at least", 1.5),
    ("kfac T=1", "foof T=1", "at least", None),
]
"""The first costs at most or at least so many times the second; without a number for information."""
